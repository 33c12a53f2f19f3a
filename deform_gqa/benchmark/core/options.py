"""Options that every suite has: where to run, how long to sample, where to write."""

import argparse
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import OptionError
from .sampling import Sampling

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
QUICK_TIME_S = 0.2
DEFAULT_TIME_S = 0.5
# One thread: on busy cores the threads of a call wait for each other.
QUICK_THREADS = 1
MAX_SIDE = 16384


def add_output_arguments(parser: argparse.ArgumentParser, quick: str) -> None:
    """What every suite that measures has; ``quick`` says what --quick chooses."""
    add = parser.add_argument
    add('--threads', type=int, help="of a CPU (default: torch's choice, 1 if quick)")
    add('--quick', action='store_true', help=f'{quick}, under a minute on 2 cores')
    add('--out', metavar='DIR', help='write JSON, Markdown and PNG to this folder')


def add_measure_arguments(
    parser: argparse.ArgumentParser,
    backends: Sequence[str],
    directions: Sequence[str],
    quick: str,
    /,
    **notes: str,
) -> None:
    """The arguments of :class:`MeasureOptions`.

    Args:
        parser: Of a suite.
        backends: All that there are.
        directions: All that there are.
        quick: What --quick chooses.
        notes: Help texts by argument, where a suite has defaults to name.
    """

    def add(name: str, **options: Any) -> None:
        option = '--' + name.replace('_', '-')
        options['help'] = notes.get(name, options.get('help'))
        parser.add_argument(option, **options)

    add('backends', nargs='+', metavar='B', help=f'of {", ".join(backends)}')
    add('sizes', nargs='+', metavar='HxW', help='images in pixels')
    add('batch_sizes', nargs='+', type=int, metavar='N', help='images a call')
    add('kv_heads', nargs='+', metavar='K')
    add('directions', nargs='+', metavar='D', help=f'of {", ".join(directions)}')
    add('device', help="'cpu' or 'cuda[:N]' (default: cuda where there is one)")
    add('repeats', type=int, help='samples (default: as many as fill --min-time-s)')
    add('min_time_s', type=float, help='sampling time a row, at least 3 samples')
    add('time_limit_s', type=float, help='start no measurement after that time')
    add_output_arguments(parser, quick)


@dataclasses.dataclass(frozen=True)
class MeasureOptions:
    """Checked options; see :func:`add_measure_arguments`."""

    device: torch.device
    sampling: Sampling
    threads: int | None
    time_limit_s: float | None
    out: str | None
    backends: tuple[str, ...]
    directions: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    batch_sizes: tuple[int, ...]
    kv_heads: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """For the report."""
        values = dataclasses.asdict(self)
        del values['out']
        return {**values, 'device': str(self.device)}

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None without."""
        return None

    def use_threads(self) -> None:
        use_threads(self.threads)

    def deadline(self) -> 'Deadline':
        """The time limit, counted from now."""
        return Deadline(self.time_limit_s)


class Deadline:
    """A number of seconds from now; None for no limit."""

    def __init__(self, limit_s: float | None):
        self._end_s = math.inf if limit_s is None else time.monotonic() + limit_s

    def is_past(self) -> bool:
        return time.monotonic() > self._end_s


def resolve_measure(
    args: argparse.Namespace,
    backends: Sequence[str],
    directions: Sequence[str],
    /,
    **defaults: Sequence[Any],
) -> dict[str, Any]:
    """The fields of :class:`MeasureOptions` from checked arguments.

    Args:
        args: As parsed.
        backends: All that there are.
        directions: All that there are, and the default.
        defaults: Of backends, sizes, batch_sizes and kv_heads.

    Raises:
        OptionError: For the first wrong option.
    """
    check_out(args.out)
    check_options(args, 'repeats', 'min_time_s', 'time_limit_s', 'batch_sizes')
    given = {
        name: unique(getattr(args, name) or default)
        for name, default in defaults.items()
    }
    default_time_s = QUICK_TIME_S if args.quick else DEFAULT_TIME_S
    return given | dict(
        device=parse_device(args.device),
        sampling=Sampling(args.repeats, args.min_time_s or default_time_s),
        threads=resolve_threads(args),
        time_limit_s=args.time_limit_s,
        out=args.out,
        backends=one_of('--backends', given['backends'], backends),
        directions=one_of('--directions', args.directions or directions, directions),
        sizes=unique(parse_size(text) for text in given['sizes']),
    )


def check_out(out: str | None) -> None:
    """Raises OptionError for --out where nothing could be written after all the work.

    A file is in the way, or the folder is not ours to write to.
    """
    if out is None:
        return
    paths = Path(out), *Path(out).parents
    # Not Path.exists(), which raises where it may not look.
    present = next(path for path in paths if os.path.exists(path))
    if not present.is_dir():
        raise OptionError(f'--out {out!r} cannot be a folder: {present} is a file')
    if not os.access(present, os.W_OK | os.X_OK):
        raise OptionError(
            f'--out {out!r} cannot be written: no permission in {present}'
        )


def resolve_threads(args: argparse.Namespace) -> int | None:
    """Threads of a CPU; None for torch's choice."""
    check_positive('--threads', [args.threads])
    return QUICK_THREADS if args.quick and args.threads is None else args.threads


def use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


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


def unique(values: Iterable) -> tuple:
    """The values, once each, in their order."""
    return tuple(dict.fromkeys(values))


def one_of(option: str, values: Iterable, known: Iterable) -> tuple:
    """The values, once each.

    Raises:
        OptionError: For the first that is not known.
    """
    known, values = list(known), unique(values)
    for value in values:
        if value not in known:
            names = ', '.join(map(str, known))
            raise OptionError(f'{option}: unknown {value!r}; there are {names}')
    return values


def parse_device(text: str | None) -> torch.device:
    """The device named, by default a GPU where there is one.

    Raises:
        OptionError: For another kind of device, or one that is not there.
    """
    if text is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if not re.fullmatch(r'cpu|cuda(:\d+)?', text):
        raise OptionError(f"--device must be 'cpu' or 'cuda[:N]', got {text!r}")
    device = torch.device(text)
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise OptionError(f'--device {text}: torch sees {count} CUDA devices')
    return device


def check_positive(option: str, values: Sequence[float | None]) -> None:
    """None stands for an option that is not given.

    Raises:
        OptionError: For a number that is not positive and finite.
    """
    for value in values:
        if value is not None and not 0 < value < float('inf'):
            raise OptionError(f'{option} must be positive, got {value}')


def check_options(args: argparse.Namespace, *names: str) -> None:
    """check_positive for options by the name of their argument, lists or single."""
    for name in names:
        given = getattr(args, name)  # None where it is not given
        values = given if isinstance(given, (list, tuple)) else [given]
        check_positive('--' + name.replace('_', '-'), values)
