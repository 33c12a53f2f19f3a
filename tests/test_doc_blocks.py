"""The code blocks of the documentation run, and its commands have options that exist.

Most blocks run by themselves: configs are loaded and what they set is built, other code
is executed in a temporary folder. SETTINGS holds what the others need.
"""

import ast
import configparser
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

import deform_gqa.conversion
import deform_gqa.engine
import deform_gqa.models  # noqa: F401
from tests.doc_blocks import (
    ROOT,
    Block,
    blocks,
    build_config,
    commands,
    parse_command,
    run_code,
    words_of,
)

QUICKSTART = 'configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'
BACKBONE_CONFIG = "arch='t++',                # 't'"  # in a block of the front page


class Setting(NamedTuple):
    """What a block needs to run."""

    names: Callable[[], dict[str, Any]] = dict  # called in the folder of the run
    base: str | None = None  # _base_ of a part of a config
    files: tuple[tuple[str, str], ...] = ()  # file: what a block that has it contains
    package: str | None = None  # without which the block is skipped
    device: str | None = (
        None  # on which it runs, if not on 'meta' as a config, else CPU
    )


def tensors(**shapes) -> dict[str, torch.Tensor]:
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def deform_attn_inputs():
    q = dict(q=(1, 4, 48, 8), k=(1, 2, 12, 8), v=(1, 2, 12, 8))
    return dict(**tensors(**q, pos=(1, 2, 12, 2), rpb_table=(4, 15, 11)), H=8, W=6)


def token_groups():
    from deform_gqa import ops, visualization

    names = ('custom_gqa', 'group_attention', 'group_queries', 'scaled_dot_product_gqa')
    return dict(
        **{name: getattr(ops, name) for name in names},
        visualize_attention=visualization.visualize_attention,
        my_strategy=lambda q: ops.group_queries(q, 2),
        **tensors(q=(1, 16, 4, 8), k=(1, 16, 2, 8), v=(1, 16, 2, 8)),
        tokens=[str(i) for i in range(16)],
    )


def continuous_bias():
    options = dict(dim=16, dim_head=8, heads=2, num_groups=1, offset_groups=1)
    return dict(
        attention=MODELS.build(dict(type='DeformableAttention2D', **options)).train()
    )


def tiny_dat(**options) -> nn.Module:
    torch.manual_seed(0)
    arch = dict(
        embed_dims=(16, 16, 16, 16),
        depths=(1, 1, 1, 1),
        num_heads=(4, 4, 4, 4),
        block_types=('D', 'D', 'D', 'D'),
    )
    return MODELS.build(dict(type='DAT', arch=arch, **options))


def heads_to_convert():
    model = tiny_dat()
    batches = [torch.rand(1, 3, 64, 64)]
    return dict(model=model, state_dict=model.state_dict(), batches=batches)


def own_attention():
    return dict(MyAttention=type('MyAttention', (nn.Module,), {}))


def cameras():
    maps = [torch.rand(1, 6, 256, side, side) for side in (8, 4, 2)]
    inputs = tensors(query=(1, 5, 256), reference_points=(1, 5, 6, 2))
    return dict(**inputs, maps=maps)


def photo(path: str) -> None:
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    cv2.imwrite(path, image)


def detector_and_photos():
    Path('photos').mkdir()
    photo('photos/photo.jpg')
    Path('configs').symlink_to(ROOT / 'configs')
    model = MODELS.build(Config.fromfile(QUICKSTART).model)
    meta = dict(dataset_meta=dict(classes=tuple('abcdef')))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), 'CHECKPOINT')
    return {}


def exported_detector():
    """A graph with the inputs and outputs of an exported detector."""
    import onnx
    from onnx import TensorProto, helper

    photo('photo.jpg')
    results = dict(
        boxes=(TensorProto.FLOAT, [1, 2, 4], [0.0] * 8),
        scores=(TensorProto.FLOAT, [1, 2], [0.5, 0.0]),
        labels=(TensorProto.INT64, [1, 2], [3, -1]),
    )
    nodes, outputs = [], []
    for name, (kind, shape, values) in results.items():
        value = helper.make_tensor(name, kind, shape, values)
        nodes.append(helper.make_node('Constant', [], [name], value=value))
        outputs.append(helper.make_tensor_value_info(name, kind, shape))
    size = ['batch', 3, 'height', 'width']
    images = helper.make_tensor_value_info('images', TensorProto.FLOAT, size)
    graph = helper.make_graph(nodes, 'detector', [images], outputs)
    opsets = [helper.make_opsetid('', 18)]
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=10), 'detector.onnx'
    )
    return {}


def saved_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(d_model=16, d_kv=4, num_heads=4, d_ff=32, num_layers=1, vocab_size=32)
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained('google-t5/t5-small')
    return {}


# A text that only the blocks of this setting hold: what they need.
SETTINGS: dict[str, Setting] = {
    'out = deform_attn(q, k, v, pos': Setting(deform_attn_inputs),
    "D=dict(type='DeformableAttention2D'": Setting(
        base='my_detector.py', files=(('my_detector.py', BACKBONE_CONFIG),)
    ),
    'bake_position_bias': Setting(continuous_bias),
    'ids = group_queries': Setting(token_groups),
    "_base_ = 'my_detector_gqa.py'": Setting(
        files=(('my_detector_gqa.py', BACKBONE_CONFIG),)
    ),
    'convert_model(model, num_kv_heads': Setting(heads_to_convert),
    '@register_adapter(MyAttention)': Setting(own_attention),
    "rules=[dict(pattern='encoder|decoder'": Setting(
        base='mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
    ),
    "type='convert_heads'": Setting(device='cpu'),
    "replaces='mmcv.MultiheadAttention'": Setting(
        base='mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
    ),
    "constructor='LayerDecayOptimWrapperConstructor'": Setting(
        base='my_detector.py', files=(('my_detector.py', BACKBONE_CONFIG),)
    ),
    "'my_attention']": Setting(files=(('my_attention.py', 'class MyAttention('),)),
    'import my_attention': Setting(files=(('my_attention.py', 'class MyAttention('),)),
    'inferencer = DetInferencer': Setting(detector_and_photos),
    "InferenceSession('detector.onnx'": Setting(
        exported_detector, package='onnxruntime'
    ),
    "attention=dict(Q=dict(type='PerQueryDeformableAttention'": Setting(
        base=str(ROOT / QUICKSTART)
    ),
    "type='MultiViewDeformableAttention'": Setting(cameras),
    'T5ForConditionalGeneration.from_pretrained': Setting(
        saved_t5, package='transformers'
    ),
    'GQABertForSequenceClassification(config)': Setting(
        package='transformers', device='meta'
    ),
}


def setting_of(block: Block) -> Setting:
    settings = [value for text, value in SETTINGS.items() if text in block.text]
    assert len(settings) <= 1, f'{block} has several settings'
    return settings[0] if settings else Setting()


def block_with(text: str) -> str:
    """The text of the first Python block that contains this."""
    return next(block.text for block in PYTHON if text in block.text)


PYTHON = [block for block in blocks('python') if block.page != 'CONTRIBUTING.md']
BASH = blocks('bash')
# tests/test_docs.py parses those of tools/benchmark.py.
COMMANDS = sorted(
    {
        words_of(command)
        for block in BASH
        for command in commands(block.text)
        if command[0] not in ('-c', 'tools/benchmark.py')
        and command[:2] != ['-m', 'pytest']
    }
)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder of its own; what a block registers or imports is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [path.stem for path in tmp_path.glob('*.py')]:
        sys.modules.pop(name, None)
    for name, kind in dict(MODELS.module_dict).items():
        if kind.__module__ not in sys.modules:
            del MODELS.module_dict[name]


def run_block(block: Block, folder: Path) -> None:
    setting = setting_of(block)
    for file, text in setting.files:
        (folder / file).write_text(block_with(text))
    if block.is_config:
        assert build_config(block.text, folder, setting.base, setting.device or 'meta')
    else:
        with torch.device(setting.device or 'cpu'):
            run_code(block, setting.names())


@pytest.mark.parametrize('block', PYTHON, ids=str)
def test_python_block_runs(block, workplace):
    if setting_of(block).package is not None:
        pytest.importorskip(setting_of(block).package)
    try:
        run_block(block, workplace)
    except Exception as error:
        message = f'{block} does not run: {error!r}; if it is right and needs names, '
        message += 'files or a base config, give it an entry in SETTINGS'
        raise AssertionError(message) from error


@pytest.mark.parametrize('text', SETTINGS)
def test_settings_are_of_use(text):
    assert any(text in block.text for block in PYTHON)


@pytest.mark.parametrize('block', blocks('python', ['CONTRIBUTING.md']), ids=str)
def test_sketch_of_an_operator_is_python(block):
    # An entry of a dict is shown without the dict.
    text = block.text if not block.text.startswith("'") else f'{{{block.text}}}'
    ast.parse(text)


@pytest.mark.parametrize('command', COMMANDS)
def test_command_has_options_that_exist(command, capsys):
    try:
        parse_command(shlex.split(command))
    except SystemExit:
        pytest.fail(f'{command}\n{capsys.readouterr().err}')


@pytest.mark.parametrize('block', BASH, ids=str)
def test_extras_exist(block):
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    extras = set(parser['options.extras_require'])
    for named in re.findall(r'(?:\.|deform_gqa)\[([\w,]+)\]', block.text):
        assert set(named.split(',')) <= extras


def test_unknown_option_is_found(capsys):
    with pytest.raises(SystemExit):
        parse_command(['tools/train.py', 'CONFIG', '--no-such-option'])


def test_missing_tool_is_found():
    with pytest.raises(FileNotFoundError):
        parse_command(['tools/no_such_tool.py', 'CONFIG'])


def test_channels_that_do_not_fit_are_found(workplace):
    text = block_with(BACKBONE_CONFIG).replace('[128, 256, 512]', '[64, 128, 256]')
    with pytest.raises(AssertionError, match='channels of the neck'):
        build_config(text, workplace)
