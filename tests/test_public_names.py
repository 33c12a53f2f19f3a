"""The public names, their options and the parameters of models are those on record.

The record is ``data/public_names.json``. What differs from it breaks somebody's config,
script or checkpoint. If that is meant, say so in the changelog and write the record
anew with ``python -m tests.test_public_names``.
"""

import hashlib
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, DefaultScope
from torch import nn

from deform_gqa.archs import ARCHS, resolve_arch
from deform_gqa.models import DAT

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name('data') / 'public_names.json'
REGISTRIES = dict(MODELS=MODELS, HOOKS=HOOKS, OPTIM_WRAPPERS=OPTIM_WRAPPERS)
PROJECT = 'projects.multiview_deform_attn.multiview_deform_attn'
# Modules that users import from, with an __all__.
ROOMS = (
    'deform_gqa',
    'deform_gqa.ops',
    'deform_gqa.models',
    'deform_gqa.models.layers',
    'deform_gqa.models.backbones',
    'deform_gqa.conversion',
    'deform_gqa.engine',
    'deform_gqa.engine.coco_metric',
    'deform_gqa.engine.hooks',
    PROJECT,
)
# Public names of modules without one.
OTHERS = {
    'deform_gqa.archs': ['resolve_arch'],
    'deform_gqa.datasets.coco': ['coco_categories', 'mask_to_polygons', 'write_json'],
    'deform_gqa.datasets.shapes': ['generate_dataset', 'sample_annotations'],
    'deform_gqa.datasets.shapes_config': ['ShapesConfig'],
    'deform_gqa.datasets.shapes_drawing': ['make_sample', 'render_background'],
    'deform_gqa.models.layers.collection': [
        'dotProductAttention',
        'from_collection',
        'multiheadAttention',
        'multiheadAttentionBatched',
        'multiheadSelfAttentionIncremental',
        'multiqueryAttentionBatched',
        'multiquerySelfAttentionIncremental',
    ],
    'deform_gqa.models.layers.projected_attention': [
        'dot_product_attention',
        'projected_attention',
        'projected_attention_step',
    ],
    # without configs, whose options are those of transformers' version
    'projects.text_gqa.text_gqa': [
        'BertGroupedQueryCrossAttention',
        'BertGroupedQuerySelfAttention',
        'GQABertForSequenceClassification',
        'GQABertModel',
        'GQAT5ForConditionalGeneration',
        'GQATransformer',
        'GQATransformerDecoderLayer',
        'GQATransformerEncoderLayer',
        'GQATransformerLM',
        'KVCache',
        'T5GroupedQueryAttention',
        'convert_bert_to_gqa',
        'convert_t5_to_gqa',
    ],
}
SMALL = dict(embed_dims=(16,) * 4, depths=(1,) * 4, num_heads=(4,) * 4)
POSITION_BIASES = ('table', 'log_cpb', 'fixed', 'dwc', None)


def exports() -> dict[str, list[str]]:
    """Names by module; ``importlib`` says where one is missing."""
    names = {room: sorted(importlib.import_module(room).__all__) for room in ROOMS}
    return names | OTHERS


def signatures() -> dict[str, str]:
    """Parameters and defaults of everything that can be called."""
    return {
        f'{room}.{name}': parameters(getattr(importlib.import_module(room), name))
        for room, names in exports().items()
        for name in names
        if callable(getattr(importlib.import_module(room), name))
    }


def parameters(function: Any) -> str:
    signature = inspect.signature(function)
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(plain))


def registered() -> dict[str, list[str]]:
    return {
        registry: sorted(
            name
            for name, module in content.module_dict.items()
            if module.__module__.startswith(('deform_gqa.', PROJECT))
        )
        for registry, content in REGISTRIES.items()
    }


def archs() -> dict[str, dict[str, Any]]:
    """What each name of the zoo stands for, and the state_dict that it makes."""
    table = {}
    for name in ARCHS:
        with torch.device('meta'):
            state = digest(DAT(name))
        options = {key: str(value) for key, value in resolve_arch(name).items()}
        table[name] = dict(options=options, state=state)
    return table


def blocks() -> dict[str, list[str]]:
    """Names and shapes of a stage of one block, for each letter and position bias."""
    return {
        f'{letter} {bias} {kv_heads} kv heads': stage_shapes(letter, bias, kv_heads)
        for letter in 'LSNPXD'
        for bias in (POSITION_BIASES if letter == 'D' else POSITION_BIASES[:1])
        for kv_heads in (4, 2)
    }


def stage_shapes(letter: str, bias: str | None, kv_heads: int) -> list[str]:
    arch = dict(SMALL, block_types=(letter,) * 4, position_bias=(bias,) * 4)
    arch['layer_scale'] = (1e-5,) * 4
    with torch.device('meta'):
        return shapes(DAT(arch, num_kv_heads=kv_heads).stages[1])


def detectors() -> dict[str, str]:
    """The state_dict that each config makes."""
    register_all_modules()
    configs = [*ROOT.glob('configs/*/*.py'), *ROOT.glob('projects/*/configs/*.py')]
    table = {}
    for path in sorted(configs):
        if '_base_' in path.parts or '-3x' in path.name:
            continue  # the long schedules have the models of the short ones
        model = Config.fromfile(path).model
        # Swin reads drop rates from a tensor
        device = 'cpu' if 'SwinTransformer' in str(model) else 'meta'
        with DefaultScope.overwrite_default_scope('mmdet'), torch.device(device):
            table[path.relative_to(ROOT).as_posix()] = digest(MODELS.build(model))
    return table


def shapes(module: nn.Module) -> list[str]:
    """In their order, which optimizers' checkpoints depend on."""
    return [f'{name} {tuple(x.shape)}' for name, x in module.state_dict().items()]


def digest(module: nn.Module) -> str:
    """Number of tensors and a hash of their names, shapes and order."""
    lines = shapes(module)
    code = hashlib.sha256('\n'.join(lines).encode()).hexdigest()
    return f'{len(lines)} tensors {code[:16]}'


PARTS = (exports, signatures, registered, archs, blocks, detectors)


@pytest.mark.parametrize('part', PARTS, ids=lambda part: part.__name__)
def test_nothing_has_changed(part):
    assert part() == json.loads(RECORD.read_text(encoding='utf-8'))[part.__name__]


if __name__ == '__main__':
    record = {part.__name__: part() for part in PARTS}
    RECORD.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
