"""Options of the suites that measure models: layers, backbones, detectors."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deform_gqa.ops.common.backends import BACKENDS

from ..core.errors import OptionError
from ..core.kv_heads import AS_CONFIGURED, SHARES, SWEEP
from ..core.options import (
    DTYPES,
    MeasureOptions,
    add_measure_arguments,
    one_of,
    resolve_measure,
)

KV_CHOICES = (AS_CONFIGURED, *SHARES, SWEEP)
AMP_DTYPES = ('fp16', 'bf16')
KV_HEADS_HELP = (
    f"'{AS_CONFIGURED}' (default), full, half or one of the query heads, {SWEEP}: all, "
    'and halves down to one, or a number: each stage has the largest divisor of its '
    'heads up to it'
)


def kv_heads_choice(text: str) -> str:
    """A share or a number."""
    if text in KV_CHOICES or (text.isdecimal() and int(text)):
        return text
    names = ', '.join(KV_CHOICES)
    raise argparse.ArgumentTypeError(f'takes {names} or a number, got {text!r}')


def add_model_arguments(
    parser: argparse.ArgumentParser,
    directions: Sequence[str],
    quick: str,
    kv_heads: Callable[[str], str] = kv_heads_choice,
    kv_heads_help: str = KV_HEADS_HELP,
) -> None:
    """Defaults of None depend on the suite and on --quick."""
    add_measure_arguments(
        parser,
        BACKENDS,
        directions,
        quick,
        kv_heads,
        backends=f'of our ops: {", ".join(BACKENDS)} (default: auto)',
        kv_heads=kv_heads_help,
    )
    add = parser.add_argument
    amp = 'autocast to fp16 or bf16 (default: none, fp32)'
    add('--amp', type=one_of(AMP_DTYPES), metavar='D', help=amp)
    add('--checkpoint', metavar='FILE', help='weights to load (default: random)')
    add_cfg_options(parser)


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
    sizes: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int] = (1,),
) -> ModelOptions:
    """The arguments; the last three are what holds where none is given.

    Raises:
        OptionError: For --cfg-options that are none, and what is not there.
    """
    if args.checkpoint is not None and not os.path.isfile(args.checkpoint):
        raise OptionError(f'--checkpoint {args.checkpoint!r} does not exist')
    common = resolve_measure(
        args,
        directions,
        backends=('auto',),
        sizes=sizes,
        batch_sizes=batch_sizes,
        kv_heads=(AS_CONFIGURED,),
    )
    return ModelOptions(
        **common,
        amp=args.amp,
        checkpoint=args.checkpoint,
        cfg_options=parse_cfg_options(args.cfg_options),
    )


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
