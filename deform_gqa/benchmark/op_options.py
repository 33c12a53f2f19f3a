"""Options of ``benchmark.py op``: the arguments, their checks and defaults."""

import argparse
import dataclasses
from typing import Any

from .common_options import (
    DTYPES,
    RunOptions,
    add_run_arguments,
    check_positive,
    one_of,
    parse_size,
    resolve_run,
)
from .floors import DIRECTIONS
from .op_cases import CASES, KV_HEADS, STAGES
from .op_peers import BACKENDS, default_backends
from .sdpa_cases import DEFAULT_SWEEP, QUICK_SWEEP, SdpaSweep
from .sdpa_cases import OP as SDPA

OPS = (*CASES, SDPA)
IMAGE_SIZES = ('800x1333', '224x224')
QUICK = dict(sizes=('240x320',), stages=(1, 2), batch_sizes=(1,), kv_heads=('full',))
# Options of deform_sdpa alone; without them its published inputs are measured.
_SDPA_LISTS = {
    'maps': 'HxW of queries and keys (default: 18x18 14x14)',
    'heads': 'query heads (default: 32 8)',
    'views': 'of queries and of keys (default: 2 6, and 12 in one case)',
    'points': 'of a query in a view (default: 4 12, and 2 in one case)',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defaults of None depend on the device and on --quick."""
    add = parser.add_argument
    add('ops', nargs='*', metavar='NAMES', help=f'of {", ".join(OPS)} (default: all)')
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
        help=f'images a call (default: 1 2 8 on CUDA, 1 on a CPU; 2 for {SDPA})',
    )
    add(
        '--kv-heads',
        nargs='+',
        metavar='K',
        help='full, half, one of the query heads, or sweep: all, halves down to one '
        '(default: the first three on CUDA, else full)',
    )
    for name, text in _SDPA_LISTS.items():
        kind = {} if name == 'maps' else {'type': int}
        add(f'--{name}', nargs='+', help=f'{SDPA}: {text}', **kind)
    add('--directions', nargs='+', metavar='D', help=f'of {", ".join(DIRECTIONS)}')
    add('--gate-only', action='store_true', help='compare with naive, time nothing')
    add_run_arguments(parser, quick='small maps')


@dataclasses.dataclass(frozen=True)
class OpOptions(RunOptions):
    """Checked options; see :func:`add_arguments`."""

    ops: tuple[str, ...]
    backends: tuple[str, ...]
    dtype: str
    sizes: tuple[tuple[int, int], ...]
    stages: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    kv_heads: tuple[str, ...]
    sdpa: SdpaSweep
    directions: tuple[str, ...]
    gate_only: bool

    def describe(self) -> dict[str, Any]:
        """For the report."""
        values = super().describe()
        del values['gate_only']
        return values


def _sdpa_sweep(args: argparse.Namespace) -> SdpaSweep:
    """The default one if no option sets a list of its own."""
    given: dict[str, Any] = {
        name: tuple(dict.fromkeys(getattr(args, name)))
        for name in _SDPA_LISTS
        if getattr(args, name) is not None
    }
    if 'maps' in given:
        sizes = (parse_size(text, '--maps') for text in given['maps'])
        given['maps'] = tuple(dict.fromkeys(sizes))
    for name in given.keys() - {'maps'}:
        check_positive(f'--{name}', given[name])
    if given:
        given['with_ends'] = False
    if args.batch_sizes is not None:
        given['batch_sizes'] = tuple(dict.fromkeys(args.batch_sizes))
    return dataclasses.replace(QUICK_SWEEP if args.quick else DEFAULT_SWEEP, **given)


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
    check_positive('--batch-sizes', values['batch_sizes'])
    return OpOptions(
        **run,
        ops=one_of('op', args.ops or OPS, OPS),
        backends=one_of('--backends', args.backends or default_backends(), BACKENDS),
        dtype=one_of('--dtype', [dtype], DTYPES)[0],
        sizes=tuple(dict.fromkeys(parse_size(text) for text in values['sizes'])),
        stages=one_of('--stages', values['stages'], STAGES),
        batch_sizes=tuple(dict.fromkeys(values['batch_sizes'])),
        kv_heads=one_of('--kv-heads', values['kv_heads'], KV_HEADS),
        sdpa=_sdpa_sweep(args),
        directions=one_of('--directions', args.directions or DIRECTIONS, DIRECTIONS),
        gate_only=args.gate_only,
    )
