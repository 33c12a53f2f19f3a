"""``benchmark.py layer``: attention modules at the shapes of a backbone's stages."""

import argparse
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.registry import MODELS

from deform_gqa.models.backbones.blocks import LETTERS
from deform_gqa.models.backbones.dat_arch import ARCHS, resolve_arch

from . import mm_models
from .common_options import one_of
from .errors import OptionError
from .model_measure import (
    FORWARD,
    TRAIN,
    ModelCase,
    Workload,
    flat_output,
    model_calls,
)
from .model_options import (
    AS_CONFIGURED,
    ModelOptions,
    add_model_arguments,
    kv_head_count,
    resolve_model,
)
from .model_report import run_suite
from .op_cases import STAGES, stage_map

DESCRIPTION = 'Latency, memory, FLOPs and parameters of attention modules.'
DIRECTIONS = (FORWARD, TRAIN)
SIZES = ('800x1333',)
QUICK_SIZES = ('240x320',)
QUICK_STAGES = (2,)
DEFAULT_LAYERS = ('DeformableGQA', 'NeighborhoodAttention')
ARCH = 't++'
# Modules of token sequences (B, N, C) name their options differently.
TOKENS = {'MultiheadGQA': ('embed_dim', 'query_heads', 'kv_heads')}
MAPS = ('dim', 'num_heads', 'num_kv_heads')
NOTES = (
    'Medians over the samples; memory is the peak during a call over the use before '
    'it. The input is a random map (B, C, H, W) of the stage (tokens (B, H * W, C) for '
    'MultiheadGQA, which attends to all of them). `forward` runs in eval mode without '
    'gradients; `train` is forward in training mode and backward to the input and all '
    'parameters, without the optimiser. FLOPs are two for each multiply-add of '
    'convolutions, linear layers and attention products.',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = [name for name, _ in LETTERS.values()] + list(TOKENS)
    add(
        'layers',
        nargs='*',
        metavar='TYPE',
        help=f'of {", ".join(names)}, or any type registered in mmdet that is built '
        f'with dim and num_heads (default: {" ".join(DEFAULT_LAYERS)}); --cfg-options '
        'are options of the type',
    )
    add('--arch', default=ARCH, help=f'whose stages to take (default: {ARCH})')
    add('--stages', nargs='+', type=int, help='default: 1 2 3 4')
    add_model_arguments(parser, DIRECTIONS, quick='stage 2 at 240x320')


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print the table, and write the files if --out is given.

    Raises:
        OptionError: For wrong options, before anything is measured.
        GateError: If two backends give different outputs.
    """
    sizes = QUICK_SIZES if args.quick else SIZES
    options = resolve_model(args, DIRECTIONS, sizes, (1,))
    one_of('--arch', [args.arch], ARCHS)
    stages = args.stages or (QUICK_STAGES if args.quick else STAGES)
    one_of('--stages', stages, STAGES)
    cases = layer_cases(args.layers or DEFAULT_LAYERS, args.arch, stages, options)
    heading = f'Layers of DAT-{args.arch.upper()}'
    run_suite('layer', heading, command, options, cases, NOTES)


def option_names(kind: str) -> tuple[str, str, str]:
    """What a type calls its channels, query heads and kv heads."""
    return TOKENS.get(kind, MAPS)


def layer_config(
    kind: str, arch_name: str, stage: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The module as the arch's stage (1 to 4) has it, with options over that.

    Raises:
        OptionError: For a type that is not registered, or an option that it lacks.
    """
    if MODELS.get(kind) is None:
        mm_models.register_stock_models()
    module_class = MODELS.get(kind)
    if module_class is None:
        raise OptionError(f'layer {kind!r} is not registered in mmdet.registry')
    arch = resolve_arch(arch_name)
    dim_name, heads_name, _ = option_names(kind)
    config = {dim_name: arch['embed_dims'][stage - 1]}
    config[heads_name] = arch['num_heads'][stage - 1]
    if kind in TOKENS:
        config[TOKENS[kind][2]] = arch['num_heads'][stage - 1]
    for name, arch_options in LETTERS.values():
        if name == kind:
            config |= {o: arch[key][stage - 1] for o, key in arch_options.items()}
    unknown = sorted(set(options) - set(inspect.signature(module_class).parameters))
    if unknown:
        raise OptionError(f'--cfg-options: {kind} takes no option {unknown[0]!r}')
    return {'type': kind, **config, **options}


def with_kv_heads(config: dict[str, Any], choice: str) -> dict[str, Any]:
    """A copy with that many kv heads.

    Raises:
        OptionError: If the type has no kv heads.
    """
    _, heads_name, kv_name = option_names(config['type'])
    if choice == AS_CONFIGURED:
        return config
    if kv_name not in inspect.signature(MODELS.get(config['type'])).parameters:
        raise OptionError(f'--kv-heads {choice}: {config["type"]} has no kv heads')
    return {**config, kv_name: kv_head_count(config[heads_name], choice)}


def layer_cases(
    layers: Sequence[str], arch: str, stages: Sequence[int], options: ModelOptions
) -> list[ModelCase]:
    """Every layer at every stage, number of kv heads, image size and batch size."""
    cases: dict[str, ModelCase] = {}
    for kind in layers:
        for stage in stages:
            config = layer_config(kind, arch, stage, options.cfg_options)
            for choice in options.kv_heads:
                chosen = with_kv_heads(config, choice)
                for size in options.sizes:
                    for batch in options.batch_sizes:
                        case = layer_case(chosen, stage, size, batch, options)
                        cases[case.name] = case
    return list(cases.values())


def layer_case(
    config: dict[str, Any],
    stage: int,
    size: tuple[int, int],
    batch: int,
    options: ModelOptions,
) -> ModelCase:
    kind = config['type']
    _, heads_name, kv_name = option_names(kind)
    heads = config[heads_name]
    kv_heads = config.get(kv_name) or heads
    fields = {
        'layer': kind,
        'stage': stage,
        'image': f'{size[0]}x{size[1]}',
        'kv heads': 'all' if kv_heads == heads else f'{kv_heads} of {heads}',
    }
    name = f'layer/{kind}/stage{stage}/{fields["image"]}/kv{kv_heads}of{heads}/b{batch}'
    grid = stage_map(size, stage)
    build = functools.partial(build_workload, config, grid, batch, options)
    return ModelCase(name, fields, batch, build)


def build_workload(
    config: dict[str, Any],
    grid: tuple[int, int],
    batch: int,
    options: ModelOptions,
    backend: str,
) -> Workload:
    """The module on a random map of the stage, which takes a gradient too."""
    device = options.device
    model = mm_models.build_model(config, device, options.checkpoint)
    dtype = options.amp_dtype or torch.float32
    used = mm_models.set_backend(model, backend, device, dtype)
    dim_name = option_names(config['type'])[0]
    shape = (batch, config[dim_name], *grid)
    if config['type'] in TOKENS:
        shape = (batch, grid[0] * grid[1], config[dim_name])
    x = torch.randn(shape, device=device).requires_grad_()
    inputs = (x, x, x) if config['type'] in TOKENS else (x,)
    calls = model_calls(
        lambda: model(*inputs), model, device, options.amp_dtype, inputs=[x]
    )
    return Workload(model, calls, used, lambda: flat_output(calls[FORWARD]))
