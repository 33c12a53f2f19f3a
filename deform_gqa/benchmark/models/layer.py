"""``benchmark.py layer``: attention modules at the shapes of a backbone's stages."""

import argparse
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.registry import MODELS

from deform_gqa.archs import ARCHS, resolve_arch
from deform_gqa.models.backbones.blocks import LETTERS

from ..core.cases import FORWARD, TRAIN, Case, Workload
from ..core.errors import OptionError
from ..core.fields import kv_heads_text, size_text
from ..core.kv_heads import AS_CONFIGURED, SWEEP, kv_head_count, kv_head_counts
from ..core.options import one_of
from ..ops.case import STAGES, stage_map
from . import build
from .options import ModelOptions, add_model_arguments, resolve_model
from .report import Built, model_case, run_suite
from .workload import flat_output, model_calls

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
    'convolutions, linear layers and attention products.'
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
        build.register_stock_models()
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


def with_kv_heads(config: dict[str, Any], choices: Sequence[str]) -> list[dict]:
    """A copy for each number of kv heads.

    Raises:
        OptionError: If the type has no kv heads.
    """
    _, heads_name, kv_name = option_names(config['type'])
    heads, configs = config[heads_name], []
    for choice in choices:
        if choice == AS_CONFIGURED:
            configs.append(config)
            continue
        if kv_name not in inspect.signature(MODELS.get(config['type'])).parameters:
            raise OptionError(f'--kv-heads {choice}: {config["type"]} has no kv heads')
        if choice == SWEEP:
            counts = kv_head_counts(heads, [SWEEP])
        else:
            counts = [kv_head_count(heads, choice)]
        configs += [{**config, kv_name: count} for count in counts]
    return configs


def layer_cases(
    layers: Sequence[str], arch: str, stages: Sequence[int], options: ModelOptions
) -> list[Case]:
    """Every layer at every stage, number of kv heads, image size and batch size."""
    configs = [
        (stage, chosen)
        for kind in layers
        for stage in stages
        for chosen in with_kv_heads(
            layer_config(kind, arch, stage, options.cfg_options), options.kv_heads
        )
    ]
    cases = [
        layer_case(config, stage, size, batch, options)
        for stage, config in configs
        for size in options.sizes
        for batch in options.batch_sizes
    ]
    return list({case.name: case for case in cases}.values())


def layer_case(
    config: dict[str, Any],
    stage: int,
    size: tuple[int, int],
    batch: int,
    options: ModelOptions,
) -> Case:
    kind = config['type']
    _, heads_name, kv_name = option_names(kind)
    heads = config[heads_name]
    kv_heads = config.get(kv_name) or heads
    fields = {
        'layer': kind,
        'stage': stage,
        'image': size_text(size),
        'kv heads': kv_heads_text(kv_heads, heads),
    }
    name = f'layer/{kind}/stage{stage}/{fields["image"]}/kv{kv_heads}of{heads}/b{batch}'
    grid = stage_map(size, stage)
    return model_case(name, fields, batch, options, build_workload, config, grid, batch)


def build_workload(
    config: dict[str, Any],
    grid: tuple[int, int],
    batch: int,
    options: ModelOptions,
    backend: str,
) -> Built:
    """The module on a random map of the stage, which takes a gradient too."""
    model, used = build.with_backend(config, options, backend)
    dim_name = option_names(config['type'])[0]
    shape = (batch, config[dim_name], *grid)
    if config['type'] in TOKENS:
        shape = (batch, grid[0] * grid[1], config[dim_name])
    x = torch.randn(shape, device=options.device).requires_grad_()
    inputs = (x, x, x) if config['type'] in TOKENS else (x,)
    calls = model_calls(
        lambda: model(*inputs), model, options.device, options.amp_dtype, inputs=[x]
    )
    workload = Workload(used, calls, model=model)
    return workload, lambda: flat_output(calls[FORWARD])
