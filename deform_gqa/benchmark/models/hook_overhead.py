"""``benchmark.py hook-overhead``: what RuntimeBenchmarkHook costs a training.

One training, in blocks of as many iterations as lie between two samples. Blocks with
the hook alternate with blocks without it, in the order without, with, with, without,
so that drift cancels. Two estimates come out:

- blocks: the time of a block with the hook over that of its neighbour without. Noise
  of the machine enters in full; how far two blocks without the hook lie apart tells
  how much that is.
- samples: the sampled iteration against the median of its block, over the interval.
  The same noise is divided by the interval.

Unlike the other suites this one needs mmengine and whatever the config needs.
"""

import argparse
import dataclasses
import functools
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from deform_gqa.engine import RuntimeBenchmarkHook
from deform_gqa.profiling.environment import describe_environment

from ..core.errors import OptionError
from ..core.options import check_options, check_out, use_threads
from ..core.progress import progress
from ..core.report import FORMAT_VERSION
from ..core.writer import publish
from . import hook_report

__all__ = ['add_arguments', 'run']

DESCRIPTION = 'What RuntimeBenchmarkHook costs a training.'
DEFAULT_CONFIG = 'configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'
DEFAULT_PAIRS = 6
_CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('config', nargs='?', default=DEFAULT_CONFIG, help='default: %(default)s')
    default = RuntimeBenchmarkHook().every['train']
    add('--interval', type=int, default=default, help='default: %(default)s, the hook')
    add('--pairs', type=int, default=DEFAULT_PAIRS, help='default: %(default)s')
    add('--threads', type=int, help="of a CPU (default: torch's choice)")
    add('--out', metavar='DIR', help='write JSON, Markdown and PNG to this folder')


def run(args: argparse.Namespace, command: str) -> None:
    """Train, print the result, and write it if --out is given.

    Raises:
        OptionError: For wrong options, before any work starts.
    """
    check_options(args, 'interval', 'pairs', 'threads')
    check_out(args.out)
    if args.interval < 3:
        raise OptionError(f'--interval must be at least 3, got {args.interval}')
    if not Path(args.config).is_file():
        raise OptionError(f'config file {args.config!r} does not exist')
    use_threads(args.threads)
    blocks, device = train_in_blocks(args.config, args.interval, args.pairs)
    report = dict(
        format_version=FORMAT_VERSION,
        suite='hook-overhead',
        command=command,
        environment=describe_environment(device),
        config=args.config,
        interval=args.interval,
        blocks=[dataclasses.asdict(block) for block in blocks],
        summary=summarize(blocks, args.interval),
    )
    name, markdown = report['suite'], hook_report.markdown(report)
    draw = functools.partial(hook_report.figure, report)
    publish(name, report, markdown, args.out, {name: draw})


@dataclasses.dataclass
class Block:
    """Times of the iterations of one block; its first is sampled if it has the hook.

    Attributes:
        with_hook: Whether the hook was at work.
        wall_ms: Wall-clock time of each iteration, with everything in it.
        cpu_ms: CPU time that all threads of the process took for it.
    """

    with_hook: bool
    wall_ms: list[float] = dataclasses.field(default_factory=list)
    cpu_ms: list[float] = dataclasses.field(default_factory=list)


def schedule(pairs: int) -> list[bool]:
    """Which blocks have the hook: without, with, with, without, and so on."""
    return [(block // 2 + block) % 2 == 1 for block in range(2 * pairs)]


def train_in_blocks(
    config: str, interval: int, pairs: int
) -> tuple[list[Block], torch.device]:
    """Train a config; the first iterations, one interval of them, are dropped."""
    plan = [False, *schedule(pairs)]
    iters = len(plan) * interval
    with tempfile.TemporaryDirectory() as work_dir, progress(len(plan)) as step:
        runner = Runner.from_cfg(training_config(config, iters, work_dir))
        hook = SwitchedHook(plan, interval)
        watch = BlockWatch(plan, interval, step)
        for each in (hook, watch):  # the watch is the last hook of all
            runner.register_hook(each, priority='LOWEST')
        runner.train()
    return watch.blocks[1:], next(runner.model.parameters()).device


def training_config(path: str, iters: int, work_dir: str) -> Config:
    """The config's training alone, without a break for epochs or checkpoints."""
    cfg = Config.fromfile(path)
    # longer than the training: no validation
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=iters, val_interval=iters + 1
    )
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    for name in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{name}_{part}'] = None
    cfg.param_scheduler = None
    cfg.setdefault('default_hooks', {})['checkpoint'] = None
    cfg.work_dir = work_dir
    cfg.log_level = 'WARNING'
    return cfg


class SwitchedHook(RuntimeBenchmarkHook):
    """The hook, at work in some blocks only, whose first iteration it samples."""

    def __init__(self, plan: Sequence[bool], interval: int) -> None:
        super().__init__(interval=interval, warmup_iters=0)
        self._plan = plan
        self._length = interval

    def _before_iter(self, runner: Runner, mode: str = 'train', **kwargs: Any) -> None:
        if self._plan[runner.iter // self._length]:
            super()._before_iter(runner, mode=mode, **kwargs)

    def _after_iter(self, runner: Runner, mode: str = 'train', **kwargs: Any) -> None:
        following = (runner.iter + 1) // self._length
        if self._plan[runner.iter // self._length]:
            super()._after_iter(runner, mode=mode, **kwargs)
        elif following < len(self._plan) and self._plan[following]:
            self._begin_iteration(mode)


class BlockWatch(Hook):
    """Notes the times of all iterations, with the hooks and the data loading."""

    def __init__(self, plan: Sequence[bool], interval: int, step) -> None:
        self.blocks = [Block(with_hook) for with_hook in plan]
        self._length = interval
        self._step = step

    def before_train(self, runner: Runner) -> None:
        self._step(self._describe(0))
        self._last = {name: clock() for name, clock in _CLOCKS.items()}

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        block, index = divmod(runner.iter, self._length)
        is_last = index == self._length - 1
        if is_last and torch.cuda.is_available():
            torch.cuda.synchronize()  # so that a block has all of its work
        for name, clock in _CLOCKS.items():
            now = clock()
            samples = getattr(self.blocks[block], f'{name}_ms')
            samples.append((now - self._last[name]) * 1e3)
            self._last[name] = now
        if is_last and block + 1 < len(self.blocks):
            self._step(self._describe(block + 1))

    def _describe(self, block: int) -> str:
        if block == 0:
            return 'warming up'
        return 'with the hook' if self.blocks[block].with_hook else 'without'


def summarize(blocks: Sequence[Block], interval: int) -> dict[str, Any]:
    """Overheads as shares of the time without the hook, by clock.

    ``blocks``: of each pair; ``samples``: of each sampled iteration; ``noise``: how
    far a block without the hook is above or below the one before it.
    """
    summary: dict[str, Any] = {}
    for clock in _CLOCKS:
        times = [getattr(block, f'{clock}_ms') for block in blocks]
        sums = [sum(each) for each in times]
        with_hook = [block.with_hook for block in blocks]
        plain = [x for x, on in zip(sums, with_hook, strict=True) if not on]
        sampled = [x for x, on in zip(times, with_hook, strict=True) if on]
        summary[clock] = dict(
            iteration_ms=float(np.median([x / interval for x in plain])),
            blocks=_spread(_pair_overheads(sums, with_hook)),
            samples=_spread([_sample_overhead(x) for x in sampled]),
            noise=_spread([b / a - 1 for a, b in itertools.pairwise(plain)]),
        )
    return summary


def _pair_overheads(sums: Sequence[float], with_hook: Sequence[bool]) -> list[float]:
    pairs = zip(sums[::2], sums[1::2], with_hook[::2], strict=True)
    return [(a / b if on else b / a) - 1 for a, b, on in pairs]


def _sample_overhead(times_ms: Sequence[float]) -> float:
    others = float(np.median(times_ms[1:]))
    return (times_ms[0] - others) / (others * len(times_ms))


def _spread(shares: Sequence[float]) -> dict[str, float] | None:
    """None where there is nothing to compare."""
    if not shares:
        return None
    names = dict(p20=0.2, median=0.5, p80=0.8)
    return {name: float(np.quantile(shares, q)) for name, q in names.items()}
