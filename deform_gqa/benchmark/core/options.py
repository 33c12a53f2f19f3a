"""Options that every suite has: where to run, how long to sample, where to write."""

import argparse
import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .errors import OptionError
from .sampling import Sampling

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
QUICK_TIME_S = 0.2
DEFAULT_TIME_S = 0.5
# One thread: on busy cores the threads of a call wait for each other.
QUICK_THREADS = 1
MAX_SIDE = 16384


class Parser(argparse.ArgumentParser):
    """Raises OptionError for wrong arguments."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message.removeprefix('argument '))


# Types of arguments: from the text to the value, or an error that says what is wrong.


def number_from(least: float, kind: type = float) -> Callable[[str], Any]:
    """A finite number that is not below ``least``."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value < math.inf:
            what = 'positive' if least > 0 else '0 or more'
            raise argparse.ArgumentTypeError(f'must be {what}, got {value}')
        return value

    parse.__name__ = kind.__name__  # for argparse, where it is no number
    return parse


parse_count = number_from(1, int)
parse_seconds = number_from(sys.float_info.min)


def one_of(known: Iterable) -> Callable[[str], Any]:
    """The value of that text among these."""
    values = {str(value): value for value in known}

    def parse(text: str) -> Any:
        if text not in values:
            names = ', '.join(values)
            raise argparse.ArgumentTypeError(f'unknown {text!r}; there are {names}')
        return values[text]

    return parse


def parse_size(text: str) -> tuple[int, int]:
    """'800x1333' -> (800, 1333), height first."""
    match = re.fullmatch(r'(\d{1,5})x(\d{1,5})', text)
    height, width = map(int, match.groups()) if match else (0, 0)
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise argparse.ArgumentTypeError(
            f'takes HEIGHTxWIDTH of 1 to {MAX_SIDE} pixels, got {text!r}'
        )
    return height, width


def parse_device(text: str) -> torch.device:
    if not re.fullmatch(r'cpu|cuda(:\d+)?', text):
        raise argparse.ArgumentTypeError(f"must be 'cpu' or 'cuda[:N]', got {text!r}")
    return torch.device(text)


def parse_out(text: str) -> str:
    """A folder that can be written to; known before all the work."""
    paths = Path(text), *Path(text).parents
    # Not Path.exists(), which raises where it may not look.
    present = next(path for path in paths if os.path.exists(path))
    if not present.is_dir():
        raise argparse.ArgumentTypeError(
            f'{text!r} cannot be a folder: {present} is a file'
        )
    if not os.access(present, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f'{text!r} cannot be written: no permission in {present}'
        )
    return text


OUT: dict[str, Any] = dict(
    type=parse_out, metavar='DIR', help='write JSON, Markdown and PNG to this folder'
)


def add_output_arguments(parser: argparse.ArgumentParser, quick: str) -> None:
    """What every suite that measures has; ``quick`` says what --quick chooses."""
    add = parser.add_argument
    threads = "of a CPU (default: torch's choice, 1 if quick)"
    add('--threads', type=parse_count, help=threads)
    add('--quick', action='store_true', help=f'{quick}, under a minute on 2 cores')
    add('--out', **OUT)


def add_measure_arguments(
    parser: argparse.ArgumentParser,
    backends: Sequence[str],
    directions: Sequence[str],
    quick: str,
    kv_heads: Callable[[str], str],
    /,
    **notes: str,
) -> None:
    """The arguments of :class:`MeasureOptions`.

    Args:
        parser: Of a suite.
        backends: All that there are.
        directions: All that there are.
        quick: What --quick chooses.
        kv_heads: Type of the argument.
        notes: Help texts by argument, where a suite has defaults to name.
    """

    def add(name: str, kind: Callable, metavar: str, text: str, **more: Any) -> None:
        option, text = '--' + name.replace('_', '-'), notes.get(name, text)
        parser.add_argument(option, type=kind, metavar=metavar, help=text, **more)

    add('backends', one_of(backends), 'B', f'of {", ".join(backends)}', nargs='+')
    add('sizes', parse_size, 'HxW', 'images in pixels', nargs='+')
    add('batch_sizes', parse_count, 'N', 'images a call', nargs='+')
    add('kv_heads', kv_heads, 'K', 'numbers of kv heads', nargs='+')
    add('directions', one_of(directions), 'D', f'of {", ".join(directions)}', nargs='+')
    text = "'cpu' or 'cuda[:N]' (default: cuda where there is one)"
    present = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    add('device', parse_device, 'DEVICE', text, default=present)
    add('repeats', parse_count, 'N', 'samples (default: as many as fill --min-time-s)')
    add('min_time_s', parse_seconds, 'S', 'sampling time a row, at least 3 samples')
    add('time_limit_s', parse_seconds, 'S', 'start no measurement after that time')
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
    args: argparse.Namespace, directions: Sequence[str], /, **defaults: Sequence[Any]
) -> dict[str, Any]:
    """The fields of :class:`MeasureOptions`.

    Args:
        args: As parsed.
        directions: The default.
        defaults: Of backends, sizes, batch_sizes, kv_heads and options of the suite.

    Raises:
        OptionError: For a device that is not there.
    """
    count = torch.cuda.device_count()
    if args.device.type == 'cuda' and (args.device.index or 0) >= count:
        raise OptionError(f'--device {args.device}: torch sees {count} CUDA devices')
    defaults['directions'] = directions
    default_time_s = QUICK_TIME_S if args.quick else DEFAULT_TIME_S
    return dict(
        device=args.device,
        sampling=Sampling(args.repeats, args.min_time_s or default_time_s),
        threads=resolve_threads(args),
        time_limit_s=args.time_limit_s,
        out=args.out,
        **{name: unique(getattr(args, name) or x) for name, x in defaults.items()},
    )


def resolve_threads(args: argparse.Namespace) -> int | None:
    """Threads of a CPU; None for torch's choice."""
    return QUICK_THREADS if args.quick and args.threads is None else args.threads


def use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def unique(values: Iterable) -> tuple:
    """The values, once each, in their order."""
    return tuple(dict.fromkeys(values))
