"""Tests of tools/train.py, tools/test.py and what starts them in several processes."""

import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deform_gqa.datasets.shapes import generate_dataset
from deform_gqa.datasets.shapes_config import ShapesConfig
from deform_gqa.engine import load_checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name('tiny_retinanet.py')


class Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    config = ShapesConfig(num_train=4, num_val=2, num_test=0, image_size=(64, 64))
    generate_dataset(config, folder)
    return folder


@pytest.fixture(scope='module')
def start(data):
    """Starts a command in the repository; returns its exit status and its output."""

    def run(*command: str | Path) -> tuple[int, str]:
        free = socket.socket()
        free.bind(('127.0.0.1', 0))
        environment = dict(
            os.environ,
            TINY_DATA=str(data),
            OMP_NUM_THREADS='1',
            CUDA_VISIBLE_DEVICES='',
            PORT=str(free.getsockname()[1]),
            PATH=os.pathsep.join(
                [str(Path(sys.executable).parent), os.environ['PATH']]
            ),
        )
        free.close()
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=600,
        )
        return done.returncode, done.stdout

    return run


@pytest.fixture(scope='module')
def tool(start):
    """Runs a tool of tools/ in one process."""

    def run(name: str, *options: str | Path) -> tuple[int, str]:
        return start(sys.executable, f'tools/{name}', *options)

    return run


@pytest.fixture(scope='module')
def trained(tool, tmp_path_factory) -> Path:
    """The work folder of a training of two epochs."""
    work_dir = tmp_path_factory.mktemp('trained')
    status, output = tool('train.py', CONFIG, '--work-dir', work_dir)
    assert status == 0, output
    return work_dir


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Calls a tool's main in this process; returns the sentence it stops with."""
    monkeypatch.setenv('LOCAL_RANK', '0')  # so that what the tool sets is undone

    def run(name: str, *options: str | Path) -> str:
        monkeypatch.setattr(sys, 'argv', [name, *map(str, options)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return run


def state(work_dir: Path, epoch: int = 2) -> dict:
    return load_checkpoint(work_dir / f'epoch_{epoch}.pth')['state_dict']


def dumped_config(work_dir: Path) -> str:
    return (work_dir / CONFIG.name).read_text()


def dumped_metrics(work_dir: Path) -> dict:
    (file,) = work_dir.glob('*/*.json')
    return json.loads(file.read_text())


def test_train_uses_the_resumable_hook(trained):
    assert "type='ResumableCheckpointHook'" in dumped_config(trained)
    checkpoint = load_checkpoint(trained / 'epoch_2.pth')
    assert len(checkpoint['rng']['states']) == 1
    assert checkpoint['meta']['epoch'] == 2


def test_resume_ends_as_without_a_break(tool, trained, tmp_path):
    for name in ('epoch_1.pth', 'last_checkpoint'):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    status, output = tool('train.py', CONFIG, '--work-dir', tmp_path, '--resume')
    assert status == 0, output
    assert 'resumed epoch: 1' in output
    whole, resumed = state(trained), state(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_amp_runs_without_a_gpu(tool, trained, tmp_path):
    options = ('--cfg-options', 'train_cfg.max_epochs=1', 'randomness.seed=2')
    status, output = tool(
        'train.py', CONFIG, '--amp', '--auto-scale-lr', '--work-dir', tmp_path, *options
    )
    assert status == 0, output
    config = dumped_config(tmp_path)
    assert "type='BFloat16OptimWrapper'" in config
    assert 'auto_scale_lr = dict(base_batch_size=16, enable=True)' in config
    assert 'seed=2' in config
    weight = state(tmp_path, epoch=1)['bbox_head.retina_cls.weight']
    assert weight.dtype == torch.float32


def test_test_writes_predictions_pictures_and_metrics(tool, trained, tmp_path):
    out = tmp_path / 'out.pkl'
    status, output = tool(
        'test.py', CONFIG, trained / 'epoch_2.pth', '--work-dir', tmp_path / 'work',
        '--out', out, '--show-dir', 'pictures',
    )  # fmt: skip
    assert status == 0, output
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 2
    assert len(list((tmp_path / 'work').glob('*/pictures/*'))) == 2
    assert 'coco/bbox_mAP' in dumped_metrics(tmp_path / 'work')


def test_test_with_mirrored_images(tool, trained, tmp_path):
    checkpoint = trained / 'epoch_2.pth'
    status, output = tool(
        'test.py', CONFIG, checkpoint, '--tta', '--work-dir', tmp_path
    )
    assert status == 0, output
    assert "type='TestTimeAug'" in dumped_config(tmp_path)
    assert 'coco/bbox_mAP' in dumped_metrics(tmp_path)


def test_foreign_weights_are_no_success(tool, tmp_path):
    file = tmp_path / 'foreign.pth'
    torch.save(dict(state_dict={'layer.weight': torch.ones(2)}), file)
    status, output = tool('test.py', CONFIG, file, '--work-dir', tmp_path / 'work')
    assert status == 1
    assert 'nothing in the checkpoint fits the model' in output


def test_two_processes_on_the_cpu(start, tmp_path):
    status, output = start(
        'bash', 'tools/dist_train.sh', CONFIG, '2', '--work-dir', tmp_path / 'train',
        '--cfg-options', 'train_cfg.max_epochs=1',
    )  # fmt: skip
    assert status == 0, output
    checkpoint = tmp_path / 'train' / 'epoch_1.pth'
    assert len(load_checkpoint(checkpoint)['rng']['states']) == 2
    status, output = start(
        'bash', 'tools/dist_test.sh', CONFIG, checkpoint, '2',
        '--work-dir', tmp_path / 'test',
    )  # fmt: skip
    assert status == 0, output
    assert 'coco/bbox_mAP' in dumped_metrics(tmp_path / 'test')


@pytest.mark.parametrize(
    ('script', 'options', 'message'),
    [
        ('train.py', ['no.py'], "config file 'no.py' does not exist"),
        ('train.py', [CONFIG, '--resume', 'no.pth'], "'no.pth' does not exist"),
        (
            'train.py',
            [CONFIG, '--cfg-options', 'load_from=no.pth'],
            "'no.pth' does not exist",
        ),
        (
            'train.py',
            [CONFIG, '--launcher', 'slurm'],
            'needs the environment variable SLURM_PROCID',
        ),
        ('test.py', [CONFIG, 'no.pth'], "'no.pth' does not exist"),
        (
            'test.py',
            [CONFIG, 'no.pth', '--out', 'a.json'],
            "must end with .pkl or .pickle, got 'a.json'",
        ),
    ],
)
def test_mistakes_stop_with_a_sentence(refuse, tmp_path, script, options, message):
    work_dir = tmp_path / 'work'
    assert message in refuse(script, *options, '--work-dir', work_dir)
    assert not work_dir.exists()


def test_neither_tool_runs_code_from_a_checkpoint(refuse, tmp_path):
    harm = tmp_path / 'harmed'
    file = tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict={}, meta=Malicious(harm)), file)
    (tmp_path / 'last_checkpoint').write_text(str(file))
    for command in (
        ('train.py', CONFIG, '--resume', '--work-dir', tmp_path),
        ('train.py', CONFIG, '--resume', file, '--work-dir', tmp_path / 'work'),
        ('test.py', CONFIG, file, '--work-dir', tmp_path / 'work'),
    ):
        assert f"checkpoint '{file}' was refused" in refuse(*command)
        assert not harm.exists()


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('dist_train.sh', 1),
        ('dist_test.sh', 2),
        ('slurm_train.sh', 3),
        ('slurm_test.sh', 3),
    ],
)
def test_scripts_say_how_to_call_them(start, script, arguments):
    status, output = start('bash', f'tools/{script}', *['x'] * arguments)
    assert status == 2
    assert f'usage: bash tools/{script}' in output


def test_slurm_scripts_pass_everything_on(start, tmp_path, monkeypatch):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    monkeypatch.setenv('PATH', os.pathsep.join([str(tmp_path), os.environ['PATH']]))
    monkeypatch.setenv('GPUS', '2')
    monkeypatch.setenv('SRUN_ARGS', '--quiet --time=1')
    status, output = start(
        'bash', 'tools/slurm_train.sh', 'part', 'job', 'c.py', 'work', '--amp'
    )
    assert status == 0
    assert '--ntasks=2' in output
    assert '--quiet --time=1' in output
    assert output.endswith(
        'tools/train.py c.py --work-dir work --launcher slurm --amp\n'
    )
    status, output = start(
        'bash', 'tools/slurm_test.sh', 'part', 'job', 'c.py', 'a.pth', '--tta'
    )
    assert status == 0
    assert output.endswith('tools/test.py c.py a.pth --launcher slurm --tta\n')
