"""Options of ``benchmark.py op``: the arguments, their checks and defaults."""

import argparse
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .errors import OptionError
from .floors import DIRECTIONS
from .op_cases import CASES, KV_HEADS, STAGES
from .op_peers import BACKENDS
from .sdpa_cases import DEFAULT_SWEEP, QUICK_SWEEP, SdpaSweep
from .sdpa_cases import OP as SDPA
from .timing import Sampling

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
OPS = (*CASES, SDPA)
IMAGE_SIZES = ('800x1333', '224x224')
# One thread: on busy cores the threads of a call wait for each other.
QUICK = dict(
    sizes=('240x320',), stages=(1, 2), batch_sizes=(1,), kv_heads=('full',), threads=1
)
QUICK_TIME_S = 0.2
DEFAULT_TIME_S = 0.5
MAX_SIDE = 16384
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
    add('--device', help="'cpu' or 'cuda[:N]' (default: cuda where there is one)")
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
    add('--threads', type=int, help="of a CPU (default: torch's choice, 1 if quick)")
    add('--quick', action='store_true', help='small maps, under a minute on 2 cores')
    add('--repeats', type=int, help='samples (default: as many as fill --min-time-s)')
    add('--min-time-s', type=float, help='sampling time a row, at least 3 samples')
    add('--time-limit-s', type=float, help='start no measurement after that time')
    add('--gate-only', action='store_true', help='compare with naive, time nothing')
    add('--out', metavar='DIR', help='write JSON, Markdown and PNG to this folder')


@dataclasses.dataclass(frozen=True)
class OpOptions:
    """Checked options; see :func:`add_arguments`."""

    ops: tuple[str, ...]
    backends: tuple[str, ...]
    device: torch.device
    dtype: str
    sizes: tuple[tuple[int, int], ...]
    stages: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    kv_heads: tuple[str, ...]
    sdpa: SdpaSweep
    directions: tuple[str, ...]
    sampling: Sampling
    threads: int | None
    time_limit_s: float | None
    gate_only: bool
    out: str | None

    def describe(self) -> dict[str, Any]:
        """For the report."""
        values = dataclasses.asdict(self)
        del values['out'], values['gate_only']
        return {**values, 'device': str(self.device)}


def parse_size(text: str, option: str = '--sizes') -> tuple[int, int]:
    """'800x1333' -> (800, 1333), height first.

    Raises:
        OptionError: For anything else.
    """
    match = re.fullmatch(r'(\d{1,5})x(\d{1,5})', text)
    size = tuple(map(int, match.groups())) if match else (0, 0)
    if not all(1 <= side <= MAX_SIDE for side in size):
        raise OptionError(
            f'{option} takes HEIGHTxWIDTH of 1 to {MAX_SIDE} pixels, got {text!r}'
        )
    return size[0], size[1]


def _one_of(option: str, values: Iterable, known: Iterable) -> tuple:
    known, values = list(known), tuple(dict.fromkeys(values))
    for value in values:
        if value not in known:
            names = ', '.join(map(str, known))
            raise OptionError(f'{option}: unknown {value!r}; there are {names}')
    return values


def _device(text: str | None) -> torch.device:
    if text is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if not re.fullmatch(r'cpu|cuda(:\d+)?', text):
        raise OptionError(f"--device must be 'cpu' or 'cuda[:N]', got {text!r}")
    device = torch.device(text)
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise OptionError(f'--device {text}: torch sees {count} CUDA devices')
    return device


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
        _positive(f'--{name}', given[name])
    if given:
        given['with_ends'] = False
    if args.batch_sizes is not None:
        given['batch_sizes'] = tuple(dict.fromkeys(args.batch_sizes))
    return dataclasses.replace(QUICK_SWEEP if args.quick else DEFAULT_SWEEP, **given)


def _positive(option: str, values: Sequence[float | None]) -> None:
    for value in values:
        if value is not None and not 0 < value < float('inf'):
            raise OptionError(f'{option} must be positive, got {value}')


def resolve(args: argparse.Namespace) -> OpOptions:
    """Check the arguments and fill the defaults in.

    Raises:
        OptionError: For the first wrong option.
    """
    device = _device(args.device)
    cuda = device.type == 'cuda'
    defaults: dict[str, Any] = dict(
        sizes=IMAGE_SIZES,
        stages=STAGES,
        batch_sizes=(1, 2, 8) if cuda else (1,),
        kv_heads=('full', 'half', 'one') if cuda else ('full',),
        threads=None,
    )
    if args.quick:
        defaults |= QUICK
    given = vars(args)
    values = {
        name: default if given[name] is None else given[name]
        for name, default in defaults.items()
    }
    dtype = args.dtype or ('bf16' if cuda else 'fp32')
    _positive('--batch-sizes', values['batch_sizes'])
    for name in ('threads', 'repeats', 'min_time_s', 'time_limit_s'):
        _positive('--' + name.replace('_', '-'), [getattr(args, name)])
    default_time_s = QUICK_TIME_S if args.quick else DEFAULT_TIME_S
    return OpOptions(
        ops=_one_of('op', args.ops or OPS, OPS),
        backends=_one_of('--backends', args.backends or BACKENDS, BACKENDS),
        device=device,
        dtype=_one_of('--dtype', [dtype], DTYPES)[0],
        sizes=tuple(dict.fromkeys(parse_size(text) for text in values['sizes'])),
        stages=_one_of('--stages', values['stages'], STAGES),
        batch_sizes=tuple(dict.fromkeys(values['batch_sizes'])),
        kv_heads=_one_of('--kv-heads', values['kv_heads'], KV_HEADS),
        sdpa=_sdpa_sweep(args),
        directions=_one_of('--directions', args.directions or DIRECTIONS, DIRECTIONS),
        sampling=Sampling(args.repeats, args.min_time_s or default_time_s),
        threads=values['threads'],
        time_limit_s=args.time_limit_s,
        gate_only=args.gate_only,
        out=args.out,
    )
