"""Options of ``benchmark.py op``: the arguments, their checks and defaults."""

import argparse
import dataclasses
from typing import Any

from ..core.kv_heads import SHARES, SWEEP
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
from .backends import BACKENDS, default_backends
from .case import STAGES
from .registry import OP_CASES
from .workload import DIRECTIONS

IMAGE_SIZES = ('800x1333', '224x224')
KV_HEADS = (*SHARES, SWEEP)
QUICK = dict(sizes=('240x320',), stages=(1, 2), batch_sizes=(1,), kv_heads=('full',))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defaults of None depend on the device and on --quick."""
    add = parser.add_argument
    add(
        'ops',
        nargs='*',
        metavar='NAMES',
        help=f'of {", ".join(OP_CASES)} (default: all)',
    )
    add('--backends', nargs='+', metavar='B', help=f'of {", ".join(BACKENDS)}')
    add('--dtype', help='fp32, fp16 or bf16 (default: bf16 on CUDA, fp32 on a CPU)')
    add(
        '--sizes',
        nargs='+',
        metavar='HxW',
        help=f'images in pixels (default: {" ".join(IMAGE_SIZES)})',
    )
    add('--stages', nargs='+', type=int, help='of DAT-T++ (default: 1 2 3 4)')
    add(
        '--batch-sizes',
        nargs='+',
        type=int,
        metavar='N',
        help='images a call (default: 1 2 8 on CUDA, 1 on a CPU; 2 for deform_sdpa)',
    )
    add(
        '--kv-heads',
        nargs='+',
        metavar='K',
        help='full, half, one of the query heads, or sweep: all, halves down to one '
        '(default: the first three on CUDA, else full)',
    )
    for case in OP_CASES.values():
        case.add_arguments(parser)
    add('--directions', nargs='+', metavar='D', help=f'of {", ".join(DIRECTIONS)}')
    add('--gate-only', action='store_true', help='compare with naive, time nothing')
    add_run_arguments(parser, quick='small maps')


@dataclasses.dataclass(frozen=True)
class OpOptions(MeasureOptions):
    """Checked options; see :func:`add_arguments`."""

    ops: tuple[str, ...]
    dtype: str
    sizes: tuple[tuple[int, int], ...]
    stages: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    kv_heads: tuple[str, ...]
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
    """Check the arguments and fill the defaults in.

    Raises:
        OptionError: For the first wrong option.
    """
    run = resolve_run(args)
    cuda = run['device'].type == 'cuda'
    defaults: dict[str, Any] = dict(
        sizes=IMAGE_SIZES,
        stages=STAGES,
        batch_sizes=(1, 2, 8) if cuda else (1,),
        kv_heads=('full', 'half', 'one') if cuda else ('full',),
    )
    if args.quick:
        defaults |= QUICK
    given = vars(args)
    values = {
        name: default if given[name] is None else given[name]
        for name, default in defaults.items()
    }
    dtype = args.dtype or ('bf16' if cuda else 'fp32')
    check_options(args, 'batch_sizes')
    return OpOptions(
        **run,
        ops=one_of('op', args.ops or OP_CASES, OP_CASES),
        backends=one_of('--backends', args.backends or default_backends(), BACKENDS),
        dtype=one_of('--dtype', [dtype], DTYPES)[0],
        sizes=unique(parse_size(text) for text in values['sizes']),
        stages=one_of('--stages', values['stages'], STAGES),
        batch_sizes=unique(values['batch_sizes']),
        kv_heads=one_of('--kv-heads', values['kv_heads'], KV_HEADS),
        own={op: case.resolve_options(args) for op, case in OP_CASES.items()},
        directions=one_of('--directions', args.directions or DIRECTIONS, DIRECTIONS),
        gate_only=args.gate_only,
    )
