"""Options of the suites that measure models: layers, backbones, detectors."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch

from deform_gqa.ops.common.backends import BACKENDS

from ..core.errors import OptionError
from ..core.kv_heads import AS_CONFIGURED, SHARES, SWEEP
from ..core.options import (
    DTYPES,
    MeasureOptions,
    add_run_arguments,
    check_options,
    one_of,
    parse_size,
    resolve_run,
    unique,
)

KV_CHOICES = (AS_CONFIGURED, *SHARES, SWEEP)
AMP_DTYPES = ('fp16', 'bf16')
KV_HEADS_HELP = (
    f"'{AS_CONFIGURED}' (default), full, half or one of the query heads, {SWEEP}: all, "
    'and halves down to one, or a number: each stage has the largest divisor of its '
    'heads up to it'
)


def add_model_arguments(
    parser: argparse.ArgumentParser,
    directions: Sequence[str],
    quick: str,
    kv_heads: str = KV_HEADS_HELP,
) -> None:
    """Defaults of None depend on the suite and on --quick."""
    add = parser.add_argument
    add(
        '--backends',
        nargs='+',
        metavar='B',
        help=f'of our ops: {", ".join(BACKENDS)} (default: auto)',
    )
    add('--amp', metavar='D', help='autocast to fp16 or bf16 (default: none, fp32)')
    add('--sizes', nargs='+', metavar='HxW', help='images in pixels')
    add('--batch-sizes', nargs='+', type=int, metavar='N', help='images a call')
    add('--kv-heads', nargs='+', metavar='K', help=kv_heads)
    add('--directions', nargs='+', metavar='D', help=f'of {", ".join(directions)}')
    add('--checkpoint', metavar='FILE', help='weights to load (default: random)')
    add_cfg_options(parser)
    add_run_arguments(parser, quick)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help="override settings, in the notation of MMDetection's tools",
    )


@dataclasses.dataclass(frozen=True)
class ModelOptions(MeasureOptions):
    """Checked options; see :func:`add_model_arguments`."""

    amp: str | None
    sizes: tuple[tuple[int, int], ...]
    batch_sizes: tuple[int, ...]
    kv_heads: tuple[str, ...]
    checkpoint: str | None
    cfg_options: dict[str, Any]

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None without."""
        return None if self.amp is None else DTYPES[self.amp]

    def describe(self) -> dict[str, Any]:
        """For the report; 'dtype' goes into its title."""
        dtype = 'fp32' if self.amp is None else f'{self.amp} autocast'
        return {**super().describe(), 'dtype': dtype}


def resolve_model(
    args: argparse.Namespace,
    directions: Sequence[str],
    sizes: Sequence[str],
    batch_sizes: Sequence[int],
) -> ModelOptions:
    """Check the arguments; the last three are what holds where none is given.

    Raises:
        OptionError: For the first wrong option.
    """
    run = resolve_run(args)
    if args.amp is not None:
        one_of('--amp', [args.amp], AMP_DTYPES)
    check_options(args, 'batch_sizes')
    kv_heads = unique(args.kv_heads or (AS_CONFIGURED,))
    for choice in kv_heads:
        check_kv_heads(choice)
    if args.checkpoint is not None and not os.path.isfile(args.checkpoint):
        raise OptionError(f'--checkpoint {args.checkpoint!r} does not exist')
    return ModelOptions(
        **run,
        backends=one_of('--backends', args.backends or ('auto',), BACKENDS),
        amp=args.amp,
        sizes=unique(parse_size(text) for text in args.sizes or sizes),
        batch_sizes=unique(args.batch_sizes or batch_sizes),
        kv_heads=kv_heads,
        directions=one_of('--directions', args.directions or directions, directions),
        checkpoint=args.checkpoint,
        cfg_options=parse_cfg_options(args.cfg_options),
    )


def check_kv_heads(choice: str) -> None:
    """Raises OptionError for what is neither a share nor a number."""
    if choice not in KV_CHOICES and not (choice.isdecimal() and int(choice) > 0):
        names = ', '.join(KV_CHOICES)
        raise OptionError(f'--kv-heads takes {names} or a number, got {choice!r}')


def parse_cfg_options(values: Sequence[str]) -> dict[str, Any]:
    """['a.b=1', 'c=x,y'] -> {'a.b': 1, 'c': ['x', 'y']}, as MMDetection's tools read.

    Raises:
        OptionError: For a value without '='.
    """
    for value in values:
        if '=' not in value:
            raise OptionError(f'--cfg-options takes KEY=VALUE, got {value!r}')
    if not values:
        return {}
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser()
    parser.add_argument('--values', nargs='+', action=DictAction)
    return parser.parse_args(['--values', *values]).values
