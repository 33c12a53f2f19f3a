import argparse
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from deform_gqa.engine import runner_utils
from deform_gqa.engine.runner_utils import (
    check_common_arguments,
    find_checkpoint_to_resume,
    load_config,
    use_amp,
    use_auto_scale_lr,
    use_resumable_checkpoints,
    use_tta,
)

FLIP = dict(type='RandomFlip', prob=1.0)
PACK = dict(type='PackDetInputs')


def make_args(**options) -> argparse.Namespace:
    return argparse.Namespace(
        **dict(
            dict(cfg_options=None, launcher='none', local_rank=0, work_dir=None),
            **options,
        )
    )


@pytest.fixture
def config_file(tmp_path) -> str:
    file = tmp_path / 'tiny.py'
    file.write_text("lr = 1\nwork_dir = None\nnested = dict(key='old')\n")
    return str(file)


def test_missing_config_file():
    with pytest.raises(FileNotFoundError, match=r"config file 'no\.py' does not exist"):
        check_common_arguments(make_args(config='no.py'))


@pytest.mark.parametrize(
    ('launcher', 'name'),
    [
        ('pytorch', 'RANK'),
        ('slurm', 'SLURM_PROCID'),
        ('mpi', 'OMPI_COMM_WORLD_RANK'),
    ],
)
def test_missing_variable_of_a_launcher(config_file, monkeypatch, launcher, name):
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f'{launcher!r} needs .* {name}, which'):
        check_common_arguments(make_args(config=config_file, launcher=launcher))


def test_local_rank_reaches_the_environment(config_file, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('LOCAL_RANK', 'to be removed')
    monkeypatch.delenv('LOCAL_RANK')
    args = make_args(config=config_file, launcher='pytorch', local_rank=1)
    check_common_arguments(args)
    assert runner_utils.os.environ['LOCAL_RANK'] == '1'


def test_options_override_the_config(config_file):
    options = {'nested.key': 'new'}
    cfg = load_config(make_args(config=config_file, cfg_options=options))
    assert cfg.nested.key == 'new'
    assert cfg.launcher == 'none'


def test_work_dir(config_file):
    args = make_args(config=config_file)
    assert load_config(args).work_dir == str(Path('work_dirs', 'tiny'))
    args.cfg_options = dict(work_dir='of_config')
    assert load_config(args).work_dir == 'of_config'
    args.work_dir = 'of_command'
    assert load_config(args).work_dir == 'of_command'


def test_amp(monkeypatch):
    optim = dict(type='OptimWrapper', loss_scale=512.0, optimizer=dict(type='SGD'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    cfg = Config(dict(optim_wrapper=optim))
    use_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 512.0
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    use_amp(cfg)
    assert cfg.optim_wrapper == dict(
        type='BFloat16OptimWrapper', optimizer=dict(type='SGD')
    )


def test_auto_scale_lr():
    cfg = Config(dict(auto_scale_lr=dict(enable=False, base_batch_size=16)))
    use_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable
    for settings in (dict(), dict(auto_scale_lr=dict(enable=False))):
        with pytest.raises(ValueError, match=r'needs auto_scale_lr=.*, got'):
            use_auto_scale_lr(Config(settings))


@pytest.mark.parametrize(
    ('hooks', 'expected'),
    [
        (
            dict(checkpoint=dict(type='CheckpointHook', interval=2)),
            dict(checkpoint=dict(type='ResumableCheckpointHook', interval=2)),
        ),
        (dict(checkpoint=dict(type='MyHook')), dict(checkpoint=dict(type='MyHook'))),
        (dict(checkpoint=None), dict(checkpoint=None)),
        (dict(), dict()),
    ],
)
def test_resumable_checkpoints(hooks, expected):
    cfg = Config(dict(default_hooks=hooks))
    use_resumable_checkpoints(cfg)
    assert cfg.default_hooks == expected


def test_tta_of_a_wrapped_dataset():
    inner = dict(type='CocoDataset', pipeline=[FLIP, PACK])
    loader = dict(dataset=dict(type='RepeatDataset', dataset=inner))
    cfg = Config(dict(model=dict(type='RetinaNet'), test_dataloader=loader))
    use_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module == dict(type='RetinaNet')
    pipeline = cfg.test_dataloader.dataset.dataset.pipeline
    assert pipeline[0] == FLIP
    assert pipeline[-1].type == 'TestTimeAug'


def test_tta_of_the_config():
    loader = dict(dataset=dict(type='CocoDataset', pipeline=[PACK]))
    cfg = Config(
        dict(
            model=dict(type='RetinaNet'),
            test_dataloader=loader,
            tta_model=dict(type='MyTTAModel'),
            tta_pipeline=[FLIP, PACK],
        )
    )
    use_tta(cfg)
    assert cfg.model == dict(type='MyTTAModel', module=dict(type='RetinaNet'))
    assert cfg.test_dataloader.dataset.pipeline == [FLIP, PACK]


def test_checkpoint_to_resume(tmp_path):
    assert find_checkpoint_to_resume(str(tmp_path)) is None
    file = tmp_path / 'epoch_1.pth'
    (tmp_path / 'last_checkpoint').write_text(str(file))
    with pytest.raises(FileNotFoundError, match=r"epoch_1\.pth' does not exist"):
        find_checkpoint_to_resume(str(tmp_path))
    torch.save(dict(state_dict={}), file)
    assert find_checkpoint_to_resume(str(tmp_path)) == str(file)
