"""``benchmark.py backbone``: DAT by name, or the backbone of a config."""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import torch

from deform_gqa.models.backbones.dat import MIN_IMAGE_SIDE
from deform_gqa.models.backbones.dat_arch import ARCHS
from deform_gqa.profiling.environment import describe_environment

from . import mm_models
from .breakdown import measure_parts
from .breakdown_report import breakdown_figure, breakdown_markdown, subjects
from .errors import OptionError
from .model_measure import (
    FORWARD,
    TRAIN,
    ModelCase,
    Workload,
    flat_output,
    model_calls,
)
from .model_options import ModelOptions, add_model_arguments, resolve_model
from .model_report import mm_versions, publish, run_suite
from .report import Report

DESCRIPTION = 'Latency, memory, FLOPs and parameters of backbones.'
DIRECTIONS = (FORWARD, TRAIN)
SIZES = ('800x1333',)
QUICK_SIZES = ('224x224',)
DEFAULT_TARGETS = ('t++',)
NOTES = (
    'Medians over the samples; memory is the peak during a call over the use before '
    'it. `forward` runs in eval mode without gradients; `train` is forward in training '
    'mode and backward to all parameters, without the optimiser. FLOPs are two for '
    'each multiply-add of convolutions, linear layers and attention products.',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'targets',
        nargs='*',
        metavar='TARGET',
        help=f'DAT archs ({", ".join(ARCHS)}), configs whose backbone to take (a path '
        "or 'mmdet::DIR/NAME.py'), or types registered in mmdet; --cfg-options are "
        'those of the backbone, or of the whole config (default: t++)',
    )
    parser.add_argument(
        '--breakdown',
        action='store_true',
        help='time and peak memory of its parts: attention by letter, MLPs, norms',
    )
    add_model_arguments(parser, DIRECTIONS, quick='t++ at 224x224')


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print the table, and write the files if --out is given.

    Raises:
        OptionError: For wrong options, before anything is measured.
        GateError: If two backends give different outputs.
    """
    sizes = QUICK_SIZES if args.quick else SIZES
    options = resolve_model(args, DIRECTIONS, sizes, (1,))
    cases = backbone_cases(args.targets or DEFAULT_TARGETS, options)
    if args.breakdown:
        run_breakdown(command, options, cases)
        return
    run_suite('backbone', 'Backbones', command, options, cases, NOTES)


def run_breakdown(
    command: str, options: ModelOptions, cases: Sequence[ModelCase]
) -> None:
    """Measure the parts, print the tables, and write the files if --out is given."""
    options.use_threads()
    rows, described = measure_parts(cases, options)
    report = Report(
        suite='breakdown',
        command=command,
        environment={**describe_environment(options.device), **mm_versions()},
        options=options.describe(),
        cases=described,
        rows=rows,
    )
    figures = [
        (f'breakdown-{number}', functools.partial(breakdown_figure, report, heading))
        for number, heading in enumerate(subjects(report), start=1)
    ]
    publish(report, breakdown_markdown(report), options.out, figures)


def backbone_config(target: str, cfg_options: dict[str, Any]) -> dict[str, Any]:
    """The config of the backbone that a target names.

    Raises:
        OptionError: For a config without a backbone, or an unknown name.
    """
    if mm_models.is_config(target):
        cfg = mm_models.load_config(target, cfg_options)
        if 'backbone' not in cfg.get('model', {}):
            raise OptionError(f'config {target!r} has no model.backbone')
        return cfg.model.backbone.to_dict()
    if target in ARCHS:
        return dict(type='DAT', arch=target, **cfg_options)
    mm_models.register_stock_models()
    if not mm_models.is_registered(target):
        raise OptionError(
            f'backbone {target!r} is no config, no type registered in mmdet and none '
            f'of {", ".join(ARCHS)}'
        )
    return dict(type=target, **cfg_options)


def backbone_cases(targets, options: ModelOptions) -> list[ModelCase]:
    """Every target at every number of kv heads, image size and batch size."""
    cases: dict[str, ModelCase] = {}
    for target in targets:
        config = backbone_config(target, options.cfg_options)
        for choice in options.kv_heads:
            chosen = mm_models.with_kv_heads(config, choice)
            for size in options.sizes:
                for batch in options.batch_sizes:
                    case = backbone_case(target, chosen, size, batch, options)
                    cases[case.name] = case
    return list(cases.values())


def backbone_case(
    target: str,
    config: dict[str, Any],
    size: tuple[int, int],
    batch: int,
    options: ModelOptions,
) -> ModelCase:
    image = f'{size[0]}x{size[1]}'
    if config['type'] == 'DAT' and min(size) < MIN_IMAGE_SIDE:
        raise OptionError(
            f'--sizes {image}: DAT takes images of at least '
            f'{MIN_IMAGE_SIDE}x{MIN_IMAGE_SIDE} pixels'
        )
    kv_heads = mm_models.kv_heads_text(config)
    fields = {
        'backbone': mm_models.short_name(target),
        'kv heads': kv_heads,
        'image': image,
    }
    name = '/'.join(['backbone', *filter(None, fields.values()), f'b{batch}'])
    build = functools.partial(build_workload, config, size, batch, options)
    return ModelCase(name, fields, batch, build)


def build_workload(
    config: dict[str, Any],
    size: tuple[int, int],
    batch: int,
    options: ModelOptions,
    backend: str,
) -> Workload:
    """The backbone on random images."""
    model = mm_models.build_model(config, options.device, options.checkpoint)
    dtype = options.amp_dtype or torch.float32
    name = mm_models.set_backend(model, backend, options.device, dtype)
    images = torch.randn(batch, 3, *size, device=options.device)
    calls = model_calls(lambda: model(images), model, options.device, options.amp_dtype)
    return Workload(model, calls, name, lambda: flat_output(calls[FORWARD]))
