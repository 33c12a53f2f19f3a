"""tools/visualize_attention.py and the hook, on a tiny detector with a DAT."""

import importlib.util
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

from deform_gqa.datasets.shapes import generate_dataset
from deform_gqa.datasets.shapes_config import ShapesConfig

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name('tiny_dat.py')
STAGES = ['backbone.stages.2.attns.0', 'backbone.stages.3.attns.0']


@pytest.fixture(scope='module')
def tool():
    path = ROOT / 'tools' / 'visualize_attention.py'
    spec = importlib.util.spec_from_file_location('visualize_attention', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A checkpoint of random weights and an image."""
    folder = tmp_path_factory.mktemp('attention')
    cfg = Config.fromfile(CONFIG)
    model = MODELS.build(cfg.model)
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'tiny.pth')
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / 'image.png'), image)
    return folder


def run(tool, monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['visualize_attention.py', *map(str, argv)])
    tool.main()


@pytest.mark.parametrize('options', [[], ['--queries', '3,4', '60,49']])
def test_a_picture_for_each_module(tool, files, monkeypatch, tmp_path, options):
    argv = [CONFIG, files / 'tiny.pth', files / 'image.png', '--out', tmp_path / 'out']
    run(tool, monkeypatch, *argv, *options)
    written = sorted(path.stem for path in (tmp_path / 'out').iterdir())
    assert written == STAGES
    for path in (tmp_path / 'out').iterdir():
        assert cv2.imread(str(path)).std() > 10


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'image': 'none.png'}, "image file 'none.png' not found"),
        ({'image': str(CONFIG)}, 'is not an image that can be read'),
        ({'checkpoint': 'none.pth'}, "checkpoint file 'none.pth' not found"),
        ({'queries': '70,3'}, 'in the image of 70 x 50, got 70,3'),
        ({'queries': '7'}, "must be X,Y in pixels, got '7'"),
    ],
)
def test_bad_input(tool, files, monkeypatch, tmp_path, capsys, change, message):
    values = dict(
        config=CONFIG, checkpoint=files / 'tiny.pth', image=files / 'image.png'
    )
    values.update({k: v for k, v in change.items() if k in values})
    queries = ['--queries', change['queries']] if 'queries' in change else []
    out = tmp_path / 'out'
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, *values.values(), '--out', out, *queries)
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_hook_draws_while_validating(monkeypatch, tmp_path):
    data = tmp_path / 'data'
    config = ShapesConfig(num_train=2, num_val=4, num_test=0, image_size=(64, 64))
    generate_dataset(config, data)
    monkeypatch.setenv('TINY_DATA', str(data))
    cfg = Config.fromfile(CONFIG)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.train_cfg.update(max_epochs=2, val_interval=1)
    cfg.custom_hooks[0].interval = 2
    cfg.default_scope, cfg.experiment_name = 'mmdet', tmp_path.name
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    drawn = []
    monkeypatch.setattr(
        Visualizer,
        'add_image',
        lambda self, name, image, step=0: drawn.append((name, image.shape, step)),
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    names = [name.split('/')[2] for name, _, _ in drawn]
    assert names == STAGES  # one image, of the first of two validations
    assert {step for _, _, step in drawn} == {1}
    assert all(shape[2] == 3 for _, shape, _ in drawn)
    assert not any(m._forward_pre_hooks for m in runner.model.modules())
    drawn.clear()
    runner.test()
    assert [name.split('/')[2] for name, _, _ in drawn] == STAGES
