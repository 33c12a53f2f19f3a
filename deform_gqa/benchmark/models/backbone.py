"""``benchmark.py backbone``: DAT by name, or the backbone of a config."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from deform_gqa.archs import ARCHS
from deform_gqa.models.backbones.dat import MIN_IMAGE_SIDE

from ..core.cases import FORWARD, TRAIN, Case, Workload
from ..core.errors import OptionError
from ..core.fields import size_text
from ..core.run import measure
from ..core.writer import publish
from . import build
from .breakdown import PartSampler
from .breakdown_report import breakdown_markdown, breakdown_pictures
from .options import ModelOptions, add_model_arguments, resolve_model
from .report import Built, model_case, model_report, run_suite
from .workload import flat_output, model_calls

DESCRIPTION = 'Latency, memory, FLOPs and parameters of backbones.'
DIRECTIONS = (FORWARD, TRAIN)
SIZES = ('800x1333',)
QUICK_SIZES = ('224x224',)
DEFAULT_TARGETS = ('t++',)
NOTES = (
    'Medians over the samples; memory is the peak during a call over the use before '
    'it. `forward` runs in eval mode without gradients; `train` is forward in training '
    'mode and backward to all parameters, without the optimiser. FLOPs are two for '
    'each multiply-add of convolutions, linear layers and attention products.'
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


def run_breakdown(command: str, options: ModelOptions, cases: Sequence[Case]) -> None:
    """Measure the parts, print the tables, and write the files if --out is given."""
    options.use_threads()
    sampler = PartSampler()
    groups = [[case] for case in cases]
    rows = measure(groups, options, sampler, counts_flops=False)
    report = model_report('breakdown', command, options, [], rows)
    report.cases.extend(sampler.parts.values())
    publish(
        'breakdown',
        report.to_json(),
        breakdown_markdown(report),
        options.out,
        breakdown_pictures(report),
    )


def backbone_config(target: str, cfg_options: dict[str, Any]) -> dict[str, Any]:
    """The config of the backbone that a target names.

    Raises:
        OptionError: For a config without a backbone, or an unknown name.
    """
    if build.is_config(target):
        cfg = build.load_config(target, cfg_options)
        if 'backbone' not in cfg.get('model', {}):
            raise OptionError(f'config {target!r} has no model.backbone')
        return cfg.model.backbone.to_dict()
    if target in ARCHS:
        return dict(type='DAT', arch=target, **cfg_options)
    build.register_stock_models()
    if not build.is_registered(target):
        raise OptionError(
            f'backbone {target!r} is no config, no type registered in mmdet and none '
            f'of {", ".join(ARCHS)}'
        )
    return dict(type=target, **cfg_options)


def backbone_cases(targets: Sequence[str], options: ModelOptions) -> list[Case]:
    """Every target at every number of kv heads, image size and batch size."""
    cases: dict[str, Case] = {}
    for target in targets:
        config = backbone_config(target, options.cfg_options)
        for choice in build.kv_choices(config, options.kv_heads):
            chosen = build.with_kv_heads(config, choice)
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
) -> Case:
    image = size_text(size)
    if config['type'] == 'DAT' and min(size) < MIN_IMAGE_SIDE:
        raise OptionError(
            f'--sizes {image}: DAT takes images of at least '
            f'{MIN_IMAGE_SIDE}x{MIN_IMAGE_SIDE} pixels'
        )
    fields = {
        'backbone': build.short_name(target),
        'kv heads': build.kv_heads_text(config),
        'image': image,
    }
    name = '/'.join(['backbone', *filter(None, fields.values()), f'b{batch}'])
    return model_case(name, fields, batch, options, build_workload, config, size, batch)


def build_workload(
    config: dict[str, Any],
    size: tuple[int, int],
    batch: int,
    options: ModelOptions,
    backend: str,
) -> Built:
    """The backbone on random images."""
    model, used = build.with_backend(config, options, backend)
    images = torch.randn(batch, 3, *size, device=options.device)
    calls = model_calls(lambda: model(images), model, options.device, options.amp_dtype)
    workload = Workload(used, calls, model=model)
    return workload, lambda: flat_output(calls[FORWARD])
