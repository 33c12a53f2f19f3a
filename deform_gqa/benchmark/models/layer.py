"""``benchmark.py layer``: attention modules at the shapes of a backbone's stages."""

import argparse
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.registry import MODELS
from torch import nn

from deform_gqa.archs import ARCHS, resolve_arch
from deform_gqa.models.backbones.blocks import LETTERS

from ..core.cases import FORWARD, TRAIN, Case, Workload
from ..core.errors import OptionError
from ..core.fields import size_text
from ..core.kv_heads import AS_CONFIGURED, Heads
from ..core.options import one_of
from ..ops.case import STAGES, stage_map
from . import build
from .options import ModelOptions, add_model_arguments, resolve_model
from .report import model_case, run_suite
from .workload import flat_output, model_calls

DESCRIPTION = 'Latency, memory, FLOPs and parameters of attention modules.'
DIRECTIONS = (FORWARD, TRAIN)
SIZES = ((800, 1333),)
QUICK_SIZES = ((240, 320),)
QUICK_STAGES = (2,)
DEFAULT_LAYERS = ('DeformableGQA', 'NeighborhoodAttention')
ARCH = 't++'
# What types call their channels, query heads and kv heads
NAMES = ('dim', 'num_heads', 'num_kv_heads')
OTHER_NAMES = {
    'DeformableAttention2D': ('dim', 'heads', 'num_groups'),
    'MultiheadGQA': ('embed_dim', 'query_heads', 'kv_heads'),
}
TOKENS = ('MultiheadGQA',)  # modules of token sequences (B, N, C)
# Kinds that no block letter stands for
OTHERS = (
    'DeformableAttention2D',
    'GroupedQueryAttention',
    'KeyDrivenGQA',
    'LinformerAttention',
    'MultiHeadAttention',
    'MultiHeadLatentAttention',
    'MultiQueryAttention',
    'PerQueryDeformableAttention',
    'SimilarityGQA',
    'SingleHeadAttention',
    'SparseGQA',
)
# Kinds of their own number of kv heads, which no option changes
KV_HEADS = {'MultiQueryAttention': 1, 'SingleHeadAttention': 1}
NOTES = (
    'The input is a random map (B, C, H, W) of the stage (tokens (B, H * W, C) for '
    'MultiheadGQA, which attends to all of them). `forward` runs in eval mode without '
    'gradients; `train` is forward in training mode and backward to the input and all '
    'parameters, without the optimiser.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = [name for name, _ in LETTERS.values()] + list(OTHERS) + list(TOKENS)
    add(
        'layers',
        nargs='*',
        metavar='TYPE',
        help=f'of {", ".join(names)}, or any type registered in mmdet that is built '
        f'with dim and num_heads (default: {" ".join(DEFAULT_LAYERS)}); --cfg-options '
        'are options of the type',
    )
    stages_of = f'whose stages to take (default: {ARCH})'
    add('--arch', type=one_of(ARCHS), default=ARCH, help=stages_of)
    add('--stages', nargs='+', type=one_of(STAGES), help='default: 1 2 3 4')
    add_model_arguments(parser, DIRECTIONS, quick='stage 2 at 240x320')


def run(args: argparse.Namespace, command: str) -> None:
    options = resolve_model(args, DIRECTIONS, QUICK_SIZES if args.quick else SIZES)
    stages = args.stages or (QUICK_STAGES if args.quick else STAGES)
    cases = layer_cases(args.layers or DEFAULT_LAYERS, args.arch, stages, options)
    heading = f'Layers of DAT-{args.arch.upper()}'
    run_suite('layer', heading, command, options, cases, NOTES)


def option_names(kind: str) -> tuple[str, str, str]:
    """What a type calls its channels, query heads and kv heads."""
    return OTHER_NAMES.get(kind, NAMES)


def layer_config(
    kind: str, arch_name: str, stage: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The module as the arch's stage (1 to 4) has it, with options over that.

    Raises:
        OptionError: For a type that is not registered, or an option that it lacks.
    """
    arch = resolve_arch(arch_name)
    dim_name, heads_name, kv_name = option_names(kind)
    config = {dim_name: arch['embed_dims'][stage - 1]}
    config[heads_name] = arch['num_heads'][stage - 1]
    if kind in OTHER_NAMES:  # whose default is not one kv head for each query head
        config[kv_name] = arch['num_heads'][stage - 1]
    for name, arch_options in LETTERS.values():
        if name == kind:
            config |= {o: arch[key][stage - 1] for o, key in arch_options.items()}
    unknown = sorted(set(options) - parameters_of(kind))
    if unknown:
        raise OptionError(f'--cfg-options: {kind} takes no option {unknown[0]!r}')
    return {'type': kind, **config, **options}


def parameters_of(kind: str) -> set[str]:
    """What a type of layer is built with; OptionError where it is not registered."""
    if MODELS.get(kind) is None:
        build.register_stock_models()
    if MODELS.get(kind) is None:
        raise OptionError(f'layer {kind!r} is not registered in mmdet.registry')
    return set(inspect.signature(MODELS.get(kind)).parameters)


def layer_slots(config: dict[str, Any]) -> list[build.Slot]:
    _, heads_name, kv_name = option_names(config['type'])
    return [(config, kv_name, (config[heads_name],))]


def layer_cases(
    layers: Sequence[str], arch: str, stages: Sequence[int], options: ModelOptions
) -> list[Case]:
    """Every layer at every stage, number of kv heads, image size and batch size.

    Raises:
        OptionError: If a type that has no kv heads is asked for a number of them.
    """
    cases: list[Case] = []
    for kind in dict.fromkeys(layers):
        for number in options.kv_heads:
            has_none = option_names(kind)[2] not in parameters_of(kind)
            if has_none and number != AS_CONFIGURED:
                raise OptionError(f'--kv-heads {number}: {kind} has no kv heads')
        for stage in dict.fromkeys(stages):
            config = layer_config(kind, arch, stage, options.cfg_options)
            configs = build.along_kv_heads(config, options.kv_heads, layer_slots)
            make = functools.partial(layer_case, stage, options)
            cases += build.model_cases(configs, options.sizes, options, make)
    return cases


def layer_case(
    stage: int,
    options: ModelOptions,
    config: dict[str, Any],
    heads: Heads,
    size: tuple[int, int],
    batch: int,
) -> Case:
    kind, image = config['type'], size_text(size)
    if kind in KV_HEADS:
        heads = Heads(heads.query, (KV_HEADS[kind],))
    fields = {'layer': kind, 'stage': stage, 'image': image, 'kv heads': str(heads)}
    kv_heads = f'kv{heads.kv[0]}of{heads.query[0]}'
    name = f'layer/{kind}/stage{stage}/{image}/{kv_heads}/b{batch}'
    make = functools.partial(
        build_workload, config, stage_map(size, stage), batch, options
    )
    return model_case(fields, heads, batch, options, make, name)


def build_workload(
    config: dict[str, Any],
    grid: tuple[int, int],
    batch: int,
    options: ModelOptions,
    backend: str,
) -> Workload:
    """The module on a random map of the stage."""
    model, used = build.with_backend(config, options, backend)
    is_map = config['type'] not in TOKENS
    dim = config[option_names(config['type'])[0]]
    shape = (batch, dim, *grid) if is_map else (batch, grid[0] * grid[1], dim)
    return module_workload(model, used, options, shape, 1 if is_map else 3)


def module_workload(
    model: nn.Module,
    backend: str,
    options: ModelOptions,
    shape: Sequence[int],
    arguments: int = 1,
) -> Workload:
    """A module on random numbers, all its arguments, which take a gradient too."""
    x = torch.randn(shape, device=options.device).requires_grad_()
    calls = model_calls(
        lambda: model(*[x] * arguments),
        model,
        options.device,
        options.amp_dtype,
        inputs=[x],
    )
    output = functools.partial(flat_output, calls[FORWARD])
    return Workload(backend, calls, output=output, model=model)
