"""``benchmark.py hook-overhead``: what RuntimeBenchmarkHook costs a training.

One training, in blocks of as many iterations as lie between two samples. Blocks with
the hook alternate with blocks without it, in the order without, with, with, without,
so that drift cancels. Two estimates come out:

- blocks: the time of a block with the hook over that of its neighbour without. Noise
  of the machine enters in full; how far two blocks without the hook lie apart tells
  how much that is.
- samples: the sampled iteration against the median of its block, over the interval.
  The same noise is divided by the interval.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from deform_gqa.engine import RuntimeBenchmarkHook
from deform_gqa.profiling.environment import describe_environment
from deform_gqa.profiling.markdown import number, records_table

from ..core import figures
from ..core.errors import OptionError
from ..core.options import OUT, parse_count, use_threads
from ..core.progress import progress
from ..core.report import FORMAT_VERSION
from ..core.tables import environment_line, join, threads_text
from ..core.writer import publish

DESCRIPTION = 'What RuntimeBenchmarkHook costs a training.'
DEFAULT_CONFIG = 'configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'
DEFAULT_PAIRS = 6
# 'cpu' is the time that all threads of the process took.
_CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('config', nargs='?', default=DEFAULT_CONFIG, help='default: %(default)s')
    default = RuntimeBenchmarkHook().every['train']
    help_ = 'default: %(default)s'
    add('--interval', type=parse_count, default=default, help=f'{help_}, the hook')
    add('--pairs', type=parse_count, default=DEFAULT_PAIRS, help=help_)
    add('--threads', type=parse_count, help="of a CPU (default: torch's choice)")
    add('--out', **OUT)


def run(args: argparse.Namespace, command: str) -> None:
    """Train, print the result, and write it if --out is given.

    Raises:
        OptionError: For wrong options, before any work starts.
    """
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
        blocks=blocks,
        summary=summarize(blocks),
    )
    draw = functools.partial(overhead_figure, report)
    name, tables = report['suite'], overhead_markdown(report)
    publish(name, report, tables, args.out, {name: draw})


# Training


def schedule(pairs: int) -> list[bool]:
    """Which blocks have the hook: without, with, with, without, and so on."""
    return [(block // 2 + block) % 2 == 1 for block in range(2 * pairs)]


def train_in_blocks(
    config: str, interval: int, pairs: int
) -> tuple[list[dict[str, Any]], torch.device]:
    """Train a config; the first iterations, one interval of them, are dropped."""
    plan = [False, *schedule(pairs)]
    with tempfile.TemporaryDirectory() as work_dir, progress(len(plan)) as step:
        cfg = training_config(config, len(plan) * interval, work_dir)
        runner = Runner.from_cfg(cfg)
        hook = SwitchedHook(plan, interval, step)
        runner.register_hook(hook)
        runner.train()
    return hook.blocks[1:], next(runner.model.parameters()).device


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
    """The hook, at work in some blocks only, whose first iteration it samples.

    Attributes:
        blocks: Whether each has the hook, and the times of its iterations by clock,
            with everything in them, the hooks and the data loading too.
    """

    def __init__(
        self, plan: Sequence[bool], interval: int, tell: Callable[[str], None]
    ) -> None:
        super().__init__(interval=interval, warmup_iters=0)
        self.blocks = [dict(with_hook=on, wall_ms=[], cpu_ms=[]) for on in plan]
        self._length = interval
        self._tell = tell

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self._last = {name: clock() for name, clock in _CLOCKS.items()}

    def _before_iter(self, runner: Runner, mode: str = 'train', **kwargs: Any) -> None:
        number, index = divmod(runner.iter, self._length)
        block = self.blocks[number]
        if index == 0:
            self._tell('with the hook' if block['with_hook'] else 'without the hook')
        if block['with_hook']:
            super()._before_iter(runner, mode=mode, **kwargs)

    def _after_iter(self, runner: Runner, mode: str = 'train', **kwargs: Any) -> None:
        number, index = divmod(runner.iter, self._length)
        block, is_last = self.blocks[number], index == self._length - 1
        if block['with_hook']:
            super()._after_iter(runner, mode=mode, **kwargs)
        elif is_last and any(x['with_hook'] for x in self.blocks[number + 1 :][:1]):
            self._begin_iteration(mode)
        if is_last and torch.cuda.is_available():
            torch.cuda.synchronize()  # so that a block has all of its work
        for name, clock in _CLOCKS.items():
            now = clock()
            block[f'{name}_ms'].append((now - self._last[name]) * 1e3)
            self._last[name] = now


# Result


def summarize(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Overheads as shares of the time without the hook, by clock.

    ``blocks``: of each pair; ``samples``: of each sampled iteration; ``noise``: how
    far a block without the hook is above or below the one before it.
    """
    summary: dict[str, Any] = {}
    with_hook = np.array([block['with_hook'] for block in blocks])
    for clock in _CLOCKS:
        times = np.array([block[f'{clock}_ms'] for block in blocks])
        sums = times.sum(axis=1)
        plain = sums[~with_hook]
        others = np.median(times[with_hook, 1:], axis=1)
        samples = (times[with_hook, 0] - others) / (others * times.shape[1])
        pairs = sums.reshape(-1, 2)
        on = with_hook.reshape(-1, 2)
        summary[clock] = dict(
            iteration_ms=float(np.median(plain) / times.shape[1]),
            blocks=_spread(pairs[on] / pairs[~on] - 1),
            samples=_spread(samples),
            noise=_spread(plain[1:] / plain[:-1] - 1),
        )
    return summary


def _spread(shares: np.ndarray) -> dict[str, float] | None:
    """None where there is nothing to compare."""
    if not shares.size:
        return None
    names = dict(p20=0.2, median=0.5, p80=0.8)
    return {name: float(np.quantile(shares, q)) for name, q in names.items()}


def overhead_markdown(report: dict[str, Any]) -> str:
    env = report['environment']
    records = [
        {
            'clock': clock,
            'iteration ms': number(record['iteration_ms']),
            'overhead by samples': _percent(record['samples']),
            'overhead by blocks': _percent(record['blocks']),
            'block without after block without': _percent(record['noise']),
        }
        for clock, record in report['summary'].items()
    ]
    return join(
        '# Overhead of RuntimeBenchmarkHook',
        f'`{report["command"]}`',
        f'{env["device"]}, {threads_text(env)}. {environment_line(env)}',
        f'{report["config"]}: {len(report["blocks"])} blocks of {report["interval"]} '
        'iterations; half of them have the hook, which samples their first iteration. '
        'Medians, and p20 to p80 in brackets.',
        records_table(records),
    )


def _percent(spread: dict[str, float] | None) -> str:
    if spread is None:
        return ''
    low, middle, high = (100 * spread[name] for name in ('p20', 'median', 'p80'))
    return f'{middle:+.2f} % ({low:+.2f} to {high:+.2f})'


def overhead_figure(report: dict[str, Any]):
    """Wall-clock time of every iteration, by whether the hook was at work."""
    figure = figures.new_figure((11, 3.2))
    axes = figure.subplots()
    for index, block in enumerate(report['blocks']):
        on, times = block['with_hook'], block['wall_ms']
        first = index * report['interval']
        color = figures.STYLES['torch' if on else 'naive']['color']
        label = 'with the hook' if on else 'without the hook'
        iterations = range(first, first + len(times))
        axes.plot(iterations, times, color=color, linewidth=0.8, label=label)
        if on:
            axes.plot(first, times[0], 'o', color='black', label='sampled by the hook')
            above = dict(xytext=(0, 6), ha='center', va='bottom')
            figures.write_value(axes, times[0], first, times[0], **above)
    axes.set_xlabel('iteration')
    axes.set_ylabel('ms an iteration, wall clock')
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.grid(axis='y', alpha=0.3)
    figures.legend(figure)
    env, record = report['environment'], report['summary']['wall']
    figure.suptitle(
        f'RuntimeBenchmarkHook, {env["device"]}, {threads_text(env)}: '
        f'{_percent(record["samples"])} by samples'
    )
    return figure
