"""The analysis tools of MMDetection run with our configs, as the user guide shows."""

import glob
import re
import runpy
import shlex
import sys
from pathlib import Path

import matplotlib as mpl
import mmdet
import pytest
from mmengine.config import Config

from deform_gqa.datasets.shapes import generate_dataset
from deform_gqa.datasets.shapes_config import ShapesConfig

ROOT = Path(__file__).parents[2]
TOOLS = f'{mmdet.__path__[0]}/.mim/tools/analysis_tools'
CONFIG = 'configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'
SMALL = dict(
    train_cfg=dict(max_epochs=1, val_interval=1),
    param_scheduler=[],
    custom_hooks=[],
    # mmengine would give the visualizer of an earlier test, with its folder.
    visualizer=dict(name='analysis_tools'),
    default_hooks=dict(logger=dict(interval=1)),
    model=dict(test_cfg=dict(score_thr=0.0, max_per_img=5)),
    train_dataloader=dict(num_workers=0, persistent_workers=False),
    val_dataloader=dict(num_workers=0, persistent_workers=False),
    test_dataloader=dict(num_workers=0, persistent_workers=False),
)


def commands() -> list[list[str]]:
    """Those of the block of the user guide that names the tools."""
    text = (ROOT / 'docs/user_guide.md').read_text()
    [block] = [
        block
        for block in re.findall(r'```bash\n(.*?)```', text, re.S)
        if 'TOOLS=' in block
    ]
    lines = re.sub(r'\\\n\s*', '', block).split('\n')
    assert f'CONFIG={CONFIG}' in lines
    return [shlex.split(line, comments=True) for line in lines if line[:7] == 'python ']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Runs a command of the guide, as in the folder of a tiny training."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp('run')
    patch.chdir(folder)
    data = ShapesConfig(num_train=4, num_val=2, num_test=2, image_size=(96, 96))
    generate_dataset(data, folder / 'data/shapes')
    cfg = Config.fromfile(ROOT / CONFIG)
    cfg.merge_from_dict(SMALL)
    cfg.dump('config.py')
    work_dir = Path('work_dirs', Path(CONFIG).stem)
    variables = dict(TOOLS=TOOLS, CONFIG='config.py', RUN=str(work_dir))
    backend = mpl.get_backend()
    mpl.use('agg')

    def call(*command):
        words = [
            re.sub(r'\$(\w+)', lambda m: variables[m[1]], word) for word in command
        ]
        words = [word.replace('epoch_12', 'epoch_1') for word in words]
        words = [found for word in words for found in glob.glob(word) or [word]]
        if words[0].startswith('tools/'):
            words[0] = str(ROOT / words[0])
        patch.setattr(sys, 'argv', words)
        runpy.run_path(words[0], run_name='__main__')

    call('tools/train.py', '$CONFIG', '--work-dir', '$RUN')
    yield call
    mpl.use(backend)
    patch.undo()


def test_analysis_tools(run, capsys):
    found = commands()
    assert len(found) == 8
    for command in found:
        run(*command[1:])
    captured = capsys.readouterr()
    out = captured.out
    assert len(list(Path('browsed').iterdir())) == 4
    assert re.search(r'Flops: 0\.\d+G\nParams: 2\.78M', out)
    # Others are named, such as aten::gelu: it is no product.
    logged = captured.out + captured.err
    assert 'Unsupported operator aten' in logged
    assert 'Unsupported operator deform_gqa' not in logged
    assert Path('losses.png').stat().st_size > 1000
    assert 'average iter time' in out
    assert Path('results.pkl').is_file()
    assert Path('confusion/confusion_matrix.png').is_file()
    assert {path.name for path in Path('analysed').iterdir()} >= {'good', 'bad'}
