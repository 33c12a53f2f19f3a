"""``benchmark.py backbone``: DAT by name, or the backbone of a config."""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import torch

from deform_gqa.archs import ARCHS
from deform_gqa.models.backbones.dat import MIN_IMAGE_SIDE

from ..core.cases import FORWARD, TRAIN, Case, Workload
from ..core.errors import OptionError
from ..core.fields import size_text
from ..core.kv_heads import Heads
from . import build
from .breakdown import run_breakdown
from .options import ModelOptions, add_model_arguments, resolve_model
from .report import model_case, run_suite
from .workload import flat_output, model_calls

DESCRIPTION = 'Latency, memory, FLOPs and parameters of backbones.'
DIRECTIONS = (FORWARD, TRAIN)
SIZES = ((800, 1333),)
QUICK_SIZES = ((224, 224),)
DEFAULT_TARGETS = ('t++',)
NOTES = (
    '`forward` runs in eval mode without gradients; `train` is forward in training '
    'mode and backward to all parameters, without the optimiser.'
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
    options = resolve_model(args, DIRECTIONS, QUICK_SIZES if args.quick else SIZES)
    cases = backbone_cases(args.targets or DEFAULT_TARGETS, options)
    if args.breakdown:
        run_breakdown(command, options, cases)
    else:
        run_suite('backbone', 'Backbones', command, options, cases, NOTES)


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
    cases: list[Case] = []
    for target in dict.fromkeys(targets):
        config = backbone_config(target, options.cfg_options)
        configs = build.along_kv_heads(config, options.kv_heads)
        make = functools.partial(backbone_case, build.short_name(target), options)
        cases += build.model_cases(configs, options.sizes, options, make)
    return cases


def backbone_case(
    name: str,
    options: ModelOptions,
    config: dict[str, Any],
    heads: Heads | None,
    size: tuple[int, int],
    batch: int,
) -> Case:
    image = size_text(size)
    if config['type'] == 'DAT' and min(size) < MIN_IMAGE_SIDE:
        raise OptionError(
            f'--sizes {image}: DAT takes images of at least '
            f'{MIN_IMAGE_SIDE}x{MIN_IMAGE_SIDE} pixels'
        )
    fields = {'backbone': name, 'kv heads': str(heads or ''), 'image': image}
    make = functools.partial(build_workload, config, size, batch, options)
    return model_case(fields, heads, batch, options, make)


def build_workload(
    config: dict[str, Any],
    size: tuple[int, int],
    batch: int,
    options: ModelOptions,
    backend: str,
) -> Workload:
    """The backbone on random images."""
    model, used = build.with_backend(config, options, backend)
    images = torch.randn(batch, 3, *size, device=options.device)
    calls = model_calls(lambda: model(images), model, options.device, options.amp_dtype)
    output = functools.partial(flat_output, calls[FORWARD])
    return Workload(used, calls, output=output, model=model)
