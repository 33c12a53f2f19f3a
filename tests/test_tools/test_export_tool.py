"""tools/export.py: its options, its check and its errors."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from deform_gqa.export import programs, verify

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
CONFIG = FOLDER / 'tiny_dat.py'


@pytest.fixture(scope='module')
def tool():
    path = ROOT / 'tools' / 'export.py'
    spec = importlib.util.spec_from_file_location('export_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp('export')
    torch.manual_seed(0)
    for name in ('tiny_dat', 'tiny_retinanet'):
        model = MODELS.build(Config.fromfile(FOLDER / f'{name}.py').model)
        torch.save(dict(state_dict=model.state_dict(), meta={}), folder / f'{name}.pth')
    return folder


def run(tool, monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, argv)])
    tool.main()


def test_a_result_that_differs(tool, weights, monkeypatch, tmp_path, capsys):
    """The command fails, and says where; the graph here is that of other weights."""
    monkeypatch.setattr(
        tool, 'write', lambda args, graph: lambda x: [1.01 * y for y in graph(x)]
    )
    path = tmp_path / 'x.pt2'
    options = ('--part', 'backbone', '--format', 'torch', '--out', path)
    with pytest.raises(SystemExit) as error:
        run(tool, monkeypatch, CONFIG, weights / 'tiny_dat.pth', *options)
    assert error.value.code == 1
    out, err = capsys.readouterr()
    assert 'differs from the model by more than is allowed' in err
    assert all(f'{size}, map0' in out for size in ('64 x 64', '96 x 160', '192 x 128'))


@pytest.mark.parametrize('form', ['onnx', 'torch', 'aoti'])
def test_formats(tool, weights, monkeypatch, tmp_path, capsys, form):
    """What is written is what is checked; tests/test_export writes it in earnest."""
    calls = []
    monkeypatch.setattr(programs, 'trace', lambda graph, **options: graph)
    monkeypatch.setattr(programs, 'write_onnx', lambda *args: calls.append('onnx'))
    monkeypatch.setattr(programs, 'write_program', lambda *args: calls.append('torch'))
    monkeypatch.setattr(programs, 'write_package', lambda *args: calls.append('aoti'))
    monkeypatch.setattr(torch.export, 'load', lambda path: calls.append('load'))
    backbone = MODELS.build(Config.fromfile(CONFIG).model.backbone)
    tool_weights = torch.load(weights / 'tiny_dat.pth')['state_dict']
    backbone.load_state_dict(
        {k[9:]: v for k, v in tool_weights.items() if k.startswith('backbone.')}
    )
    monkeypatch.setattr(verify, 'onnx_runner', lambda *args: backbone.eval())
    monkeypatch.setattr(verify, 'program_runner', lambda program: backbone.eval())
    monkeypatch.setattr(verify, 'package_runner', lambda path: backbone.eval())
    options = ('--part', 'backbone', '--format', form, '--out')
    options += (tmp_path / f'x{tool.SUFFIXES[form]}', '--check-sizes', '64x96')
    options += ('--benchmark', '--threads', 1)
    run(tool, monkeypatch, CONFIG, weights / 'tiny_dat.pth', *options)
    assert calls == dict(onnx=['onnx'], torch=['torch', 'load'], aoti=['aoti'])[form]
    out = capsys.readouterr().out
    for level in range(4):
        assert f'64 x 96, map{level}: differs by 0 (allowed: 1e-04)' in out
    assert '64 x 96, 1 threads of torch: model' in out


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (['--opset', '11'], 'opset must be from 18'),
        (
            ['--out', 'x.pt2'],
            "--out must end with .onnx for --format onnx, got 'x.pt2'",
        ),
        (['--format', 'aoti', '--out', 'x.pt2'], '--format aoti takes --part backbone'),
        (['--threads', '0'], '--threads must be at least 1, got 0'),
        (['--fixed-size', '64'], "must be HEIGHTxWIDTH in pixels, got '64'"),
        (['--check-sizes', '64x70'], 'multiples of 32'),
        (['--fixed-size', '32x64'], 'at least 64 pixels'),
        (['--cfg-options', 'model.test_cfg.nms.type=soft_nms'], "'soft_nms'"),
    ],
)
def test_bad_options(tool, weights, monkeypatch, tmp_path, capsys, change, message):
    argv = (CONFIG, weights / 'tiny_dat.pth', '--out', tmp_path / 'x.onnx', *change)
    with pytest.raises(SystemExit) as error:
        run(tool, monkeypatch, *argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('config', 'checkpoint', 'message'),
    [
        (CONFIG, 'none', "none.pth' does not exist"),
        (CONFIG, 'tiny_retinanet', 'is of another model than the config describes'),
        ('no-config', 'tiny_dat', "config 'no-config' is neither a file nor the name"),
        (
            'mask-rcnn_dat-gqa-mini_fpn_shapes',
            'mask_rcnn',
            'MaskRCNN with the head NoneType cannot be exported end to end',
        ),
    ],
)
def test_files_that_do_not_fit(
    tool, weights, monkeypatch, tmp_path, capsys, config, checkpoint, message
):
    if checkpoint == 'mask_rcnn':
        monkeypatch.setattr(tool, 'load_weights', lambda model, checkpoint: None)
        checkpoint = 'tiny_dat'
    argv = (config, weights / f'{checkpoint}.pth', '--out', tmp_path / 'x.onnx')
    with pytest.raises(SystemExit):
        run(tool, monkeypatch, *argv)
    assert message in capsys.readouterr().err
