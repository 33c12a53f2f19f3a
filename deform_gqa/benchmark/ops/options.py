"""Options of ``benchmark.py op``: the arguments, their checks and defaults."""

import argparse
import dataclasses
from typing import Any

from ..core.kv_heads import SHARES, SWEEP
from ..core.options import (
    DTYPES,
    MeasureOptions,
    add_measure_arguments,
    one_of,
    resolve_measure,
)
from .backends import BACKENDS, default_backends
from .case import STAGES
from .registry import OP_CASES
from .workload import DIRECTIONS

IMAGE_SIZES = ((800, 1333), (224, 224))
KV_HEADS = (*SHARES, SWEEP)
QUICK = dict(sizes=((240, 320),), stages=(1, 2), batch_sizes=(1,), kv_heads=('full',))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defaults of None depend on the device and on --quick."""
    add = parser.add_argument
    names = ', '.join(OP_CASES)
    names = f'of {names} (default: all)'
    add('ops', nargs='*', type=one_of(OP_CASES), metavar='NAMES', help=names)
    dtypes = 'fp32, fp16 or bf16 (default: bf16 on CUDA, fp32 on a CPU)'
    add('--dtype', type=one_of(DTYPES), help=dtypes)
    stages = 'of DAT-T++ (default: 1 2 3 4)'
    add('--stages', nargs='+', type=one_of(STAGES), help=stages)
    for case in OP_CASES.values():
        case.add_arguments(parser)
    add('--gate-only', action='store_true', help='compare with naive, time nothing')
    add_measure_arguments(
        parser,
        BACKENDS,
        DIRECTIONS,
        'small maps',
        one_of(KV_HEADS),
        sizes='images in pixels (default: 800x1333 224x224)',
        batch_sizes='images a call (default: 1 2 8 on CUDA, 1 on a CPU; 2 for '
        'deform_sdpa)',
        kv_heads='full, half, one of the query heads, or sweep: all, halves down to '
        'one (default: the first three on CUDA, else full)',
    )


@dataclasses.dataclass(frozen=True)
class OpOptions(MeasureOptions):
    """Checked options; see :func:`add_arguments`."""

    ops: tuple[str, ...]
    dtype: str
    stages: tuple[int, ...]
    own: dict[str, Any]
    gate_only: bool

    def describe(self) -> dict[str, Any]:
        """For the report."""
        values = super().describe()
        del values['gate_only']
        for op, own in values.pop('own').items():
            if OP_CASES[op].options_name is not None:
                values[OP_CASES[op].options_name] = own
        return values


def resolve(args: argparse.Namespace) -> OpOptions:
    """The arguments, with the defaults of this device."""
    cuda = args.device.type == 'cuda'
    defaults: dict[str, Any] = dict(
        ops=tuple(OP_CASES),
        backends=default_backends(),
        sizes=IMAGE_SIZES,
        stages=STAGES,
        batch_sizes=(1, 2, 8) if cuda else (1,),
        kv_heads=SHARES if cuda else ('full',),
    )
    if args.quick:
        defaults |= QUICK
    return OpOptions(
        **resolve_measure(args, DIRECTIONS, **defaults),
        dtype=args.dtype or ('bf16' if cuda else 'fp32'),
        own={op: case.resolve_options(args) for op, case in OP_CASES.items()},
        gate_only=args.gate_only,
    )
