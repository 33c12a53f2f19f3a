"""Tests of tools/convert_checkpoint.py."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import DefaultScope

from deform_gqa.conversion import convert_state_dict
from deform_gqa.datasets.shapes import generate_dataset
from deform_gqa.datasets.shapes_config import ShapesConfig
from deform_gqa.engine import load_checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = str(Path(__file__).with_name('tiny_dat.py'))
KV_HEADS = (1, 1, 1, 2)  # of 1, 1, 2 and 4 query heads
OPTIONS = ['--config', CONFIG, '--kv-heads', 'stages.2=1', 'stages.3=1/2']
LAYER = 'backbone.stages.3.attns.0'


@pytest.fixture(scope='module', autouse=True)
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    config = ShapesConfig(num_train=4, num_val=1, num_test=0, image_size=(64, 64))
    generate_dataset(config, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TINY_DATA', str(folder))
        yield folder


def build(num_kv_heads=None, config=CONFIG):
    register_all_modules(init_default_scope=False)
    model = Config.fromfile(config).model
    if num_kv_heads is not None:
        model.backbone.num_kv_heads = num_kv_heads
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(model)


@pytest.fixture(scope='module')
def state():
    """Weights of a multi-head detector."""
    return build().state_dict()


@pytest.fixture
def trained(tmp_path, state):
    path = tmp_path / 'trained.pth'
    meta = dict(dataset_meta=dict(classes=('circle',)))
    torch.save(dict(state_dict=state, meta=meta, optimizer=dict()), path)
    return path


@pytest.fixture
def tool(monkeypatch):
    """Runs the tool in this process."""
    main = runpy.run_path(str(ROOT / 'tools' / 'convert_checkpoint.py'))['main']

    def run(*arguments):
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr('sys.argv', ['convert_checkpoint.py', *arguments])
        main()

    return run


def assert_equal(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def test_detector(tool, trained, state, tmp_path, capsys):
    """The weights are those of convert_state_dict; they load with the GQA config."""
    out = tmp_path / 'new' / 'converted.pth'
    tool(trained, out, *OPTIONS)
    model = build(KV_HEADS)
    new = load_checkpoint(out)
    model.load_state_dict(new['state_dict'])
    assert_equal(new['state_dict'], convert_state_dict(state, model)[0])
    assert new['meta']['dataset_meta']['classes'] == ('circle',)
    assert len(new['meta']['head_conversion']['layers']) == 2
    assert 'backbone.stages.2.attns.0 | DeformableGQA' in capsys.readouterr().out


def test_config_with_kv_heads_needs_no_number(tool, trained, state, tmp_path):
    out = tmp_path / 'converted.pth'
    tool(
        trained,
        out,
        '--config',
        CONFIG,
        '--cfg-options',
        f'model.backbone.num_kv_heads={KV_HEADS}'.replace(' ', ''),
    )
    expected, _ = convert_state_dict(state, build(KV_HEADS))
    assert_equal(load_checkpoint(out)['state_dict'], expected)


def test_official_classifier(tool, state, tmp_path):
    """Its output is a whole backbone: norms are added, the classifier is left out."""
    backbone = {
        name.removeprefix('backbone.'): value
        for name, value in state.items()
        if name.startswith('backbone.')
        and 'norms.' not in name[: len('backbone.norms.')]
    }
    extra = {
        'cls_norm.norm.weight': torch.ones(32),
        'cls_head.weight': torch.ones(9, 32),
    }
    path, out = tmp_path / 'official.pth', tmp_path / 'converted.pth'
    torch.save(dict(model=backbone | extra), path)
    tool(path, out, *OPTIONS)
    new = build(KV_HEADS).backbone
    new.init_cfg = dict(type='Pretrained', checkpoint=str(out))
    new.init_weights()
    converted = load_checkpoint(out)['state_dict']
    assert set(converted) == set(new.state_dict())
    assert_equal({name: new.state_dict()[name] for name in converted}, converted)


def test_official_detector(tool, state, tmp_path):
    """Its buffers, which this package computes, are left out."""
    buffers = {f'{LAYER}.relative_position_index': torch.zeros(9, 9)}
    path, out = tmp_path / 'official.pth', tmp_path / 'converted.pth'
    torch.save(dict(state_dict=state | buffers, meta=dict()), path)
    tool(path, out, *OPTIONS)
    build(KV_HEADS).load_state_dict(load_checkpoint(out)['state_dict'])


def test_swin_of_mmdet(tool, tmp_path):
    config = tmp_path / 'swin.py'
    backbone = dict(
        type='SwinTransformer',
        embed_dims=8,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
        window_size=2,
    )
    config.write_text(
        f'_base_ = {CONFIG!r}\n'
        f'model = dict(backbone=dict(_delete_=True, **{backbone}),\n'
        'neck=dict(in_channels=[8, 16, 32, 64]))\n'
    )
    path, out = tmp_path / 'swin.pth', tmp_path / 'converted.pth'
    torch.save(dict(state_dict=build(config=config).state_dict()), path)
    tool(path, out, '--config', config, '--kv-heads', 0.5)
    grouped = dict(
        type='convert_heads', model=Config.fromfile(config).model, num_kv_heads=1
    )
    MODELS.build(grouped).load_state_dict(load_checkpoint(out)['state_dict'])


def test_calibration_and_report(tool, trained, tmp_path):
    errors = []
    for options in ([], ['--refit-output']):
        out = tmp_path / f'{len(options)}.pth'
        report = tmp_path / f'report{len(options)}'
        options += ['--calibrate', 2, '--grouping', 'activations', '--merge', 'aligned']
        tool(trained, out, *OPTIONS, *options, '--report', report)
        layers = json.loads((report / 'conversion.json').read_text())['layers']
        errors.append([layer['error'] for layer in layers])
        assert (report / 'conversion.png').stat().st_size > 1000
        assert '| sum ' in (report / 'conversion.md').read_text()
    assert all(after < before for before, after in zip(*errors, strict=True))


def test_calibration_of_a_backbone(tool, state, tmp_path):
    path, out = tmp_path / 'backbone.pth', tmp_path / 'converted.pth'
    start = 'backbone.'
    own = {n.removeprefix(start): x for n, x in state.items() if n.startswith(start)}
    torch.save(own, path)
    tool(path, out, *OPTIONS, '--calibrate', 1, '--refit-output')
    report = load_checkpoint(out)['meta']['head_conversion']
    assert all(layer['error'] is not None for layer in report['layers'])


def refused(tool, tmp_path, capsys, *arguments):
    """The message of a call that must fail and write nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as error:
        tool(*arguments)
    assert error.value.code == 2
    assert sorted(tmp_path.iterdir()) == before
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--kv-heads', '3'], "num_kv_heads='3' does not fit"),
        (['--kv-heads', '1', '2'], 'must be one number, or PATTERN=N'),
        (['--kv-heads', 'x=1'], "the pattern 'x' fits none"),
        (['--kv-heads', '1/0'], "got '1/0'"),
        (['--grouping', '[[0'], "--grouping must be lists of heads, got '[[0'"),
        (['--grouping', '[[0,1]]'], 'got [[0, 1]]'),
        (['--grouping', 'nearest'], "got 'nearest'"),
        (['--refit-output'], 'refit_output=True needs calibration data'),
        (['--calibrate', '-1'], '--calibrate must be at least 0, got -1'),
        (['--seed', '-1'], '--seed must be at least 0, got -1'),
        (['--config', 'missing.py'], "config file 'missing.py' does not exist"),
    ],
)
def test_wrong_options(tool, trained, tmp_path, capsys, options, message):
    out = tmp_path / 'converted.pth'
    error = refused(tool, tmp_path, capsys, trained, out, *OPTIONS, *options)
    assert message in error


def test_wanted_heads_are_there_already(tool, trained, tmp_path, capsys):
    out = tmp_path / 'converted.pth'
    error = refused(tool, tmp_path, capsys, trained, out, '--config', CONFIG)
    assert 'has the wanted numbers of kv heads already' in error


def test_the_new_file_must_be_new(tool, trained, tmp_path, capsys):
    error = refused(tool, tmp_path, capsys, trained, trained, *OPTIONS)
    assert 'is the checkpoint that is read' in error
    out = tmp_path / 'precious.pth'
    out.write_text('precious')
    assert 'exists' in refused(tool, tmp_path, capsys, trained, out, *OPTIONS)
    assert out.read_text() == 'precious'


def test_the_report_goes_to_a_folder(tool, trained, tmp_path, capsys):
    file = tmp_path / 'report'
    file.touch()
    out = tmp_path / 'converted.pth'
    error = refused(tool, tmp_path, capsys, trained, out, *OPTIONS, '--report', file)
    assert f'--report {str(file)!r} exists' in error


def test_config_without_a_model(tool, trained, tmp_path, capsys):
    config = tmp_path / 'empty.py'
    config.touch()
    out = tmp_path / 'converted.pth'
    error = refused(tool, tmp_path, capsys, trained, out, '--config', config)
    assert '--config needs model in the config' in error


def test_checkpoint_without_meta(tool, state, tmp_path):
    trained = tmp_path / 'trained.pth'
    torch.save(dict(state_dict=state, meta=None), trained)
    tool(trained, tmp_path / 'converted.pth', *OPTIONS)
    assert 'head_conversion' in load_checkpoint(tmp_path / 'converted.pth')['meta']


def test_keys_that_are_no_tensors(tool, state, tmp_path, capsys):
    name = f'{LAYER}.proj_q.weight'
    trained = tmp_path / 'trained.pth'
    torch.save(dict(state_dict={**state, name: 3}), trained)
    out = tmp_path / 'converted.pth'
    error = refused(tool, tmp_path, capsys, trained, out, *OPTIONS)
    assert f'has keys that are no tensors: {name}' in error


def test_calibration_needs_data(tool, trained, tmp_path, capsys):
    config = tmp_path / 'no_data.py'
    Config(dict(model=Config.fromfile(CONFIG).model)).dump(config)
    options = ['--config', config, '--kv-heads', 'stages.3=1', '--calibrate', '1']
    out = tmp_path / 'converted.pth'
    error = refused(tool, tmp_path, capsys, trained, out, *options)
    assert '--calibrate needs a train_dataloader' in error


@pytest.mark.parametrize(
    ('name', 'shape', 'message'),
    [
        (f'{LAYER}.proj_x.weight', (1,), 'not have: '),
        (f'{LAYER}.proj_k.weight', (9, 9), 'has shape (9, 9)'),
        (f'{LAYER}.proj_q.weight', (8, 32), 'has shape (8, 32)'),
        (f'{LAYER}.proj_out.weight', (3, 3), 'has shape (3, 3)'),
        ('neck.fpn_convs.0.conv.weight', (3,), 'has shape (3,)'),
    ],
)
def test_checkpoints_of_another_model(
    tool, state, tmp_path, capsys, name, shape, message
):
    path = tmp_path / 'other.pth'
    torch.save(dict(state_dict=dict(state) | {name: torch.ones(shape)}), path)
    out = tmp_path / 'converted.pth'
    error = refused(tool, tmp_path, capsys, path, out, *OPTIONS)
    assert name in error
    assert message in error


@pytest.mark.parametrize(
    'name', [f'{LAYER}.proj_k.weight', 'bbox_head.retina_cls.bias']
)
def test_incomplete_checkpoints(tool, state, tmp_path, capsys, name):
    path = tmp_path / 'incomplete.pth'
    torch.save({n: x for n, x in state.items() if n != name}, path)
    out = tmp_path / 'converted.pth'
    error = refused(tool, tmp_path, capsys, path, out, *OPTIONS)
    assert name in error


def test_truncated_file(tool, trained, tmp_path, capsys):
    trained.write_bytes(trained.read_bytes()[:1000])
    out = tmp_path / 'converted.pth'
    error = refused(tool, tmp_path, capsys, trained, out, *OPTIONS)
    assert 'trained.pth' in error


def test_file_without_names(tool, tmp_path, capsys):
    path, out = tmp_path / 'list.pth', tmp_path / 'converted.pth'
    torch.save([torch.ones(1)], path)
    error = refused(tool, tmp_path, capsys, path, out, *OPTIONS)
    assert 'must hold a dict, got a list' in error


def test_file_of_something_else(tool, tmp_path, capsys):
    path, out = tmp_path / 'other.pth', tmp_path / 'converted.pth'
    torch.save(dict(generator={'layer.weight': torch.ones(1)}, epoch=3), path)
    error = refused(tool, tmp_path, capsys, path, out, *OPTIONS)
    assert 'does not have: generator, epoch' in error


def test_missing_file(tool, tmp_path, capsys):
    out = tmp_path / 'converted.pth'
    error = refused(tool, tmp_path, capsys, tmp_path / 'no.pth', out, *OPTIONS)
    assert 'does not exist' in error
