"""What ``benchmark.py hook-overhead`` writes."""

from typing import Any

from deform_gqa.profiling.markdown import number, records_table

from ..core import figures
from ..core.tables import join, threads_text


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env, interval = report['environment'], report['interval']
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
        f'{env["device"]}, {threads_text(env)}, torch {env["torch"]}, commit '
        f'{env["commit"]}, {env["date"]}. Load average: {env["load_average"]} on '
        f'{env["cpu_count"]} cores.',
        f'{report["config"]}: {len(report["blocks"])} blocks of {interval} '
        'iterations; half of them have the hook, which samples their first iteration. '
        'Medians, and p20 to p80 in brackets.',
        records_table(records),
    )


def _percent(spread: dict[str, float] | None) -> str:
    if spread is None:
        return ''
    low, middle, high = (100 * spread[name] for name in ('p20', 'median', 'p80'))
    return f'{middle:+.2f} % ({low:+.2f} to {high:+.2f})'


def figure(report: dict[str, Any]):
    """Wall-clock time of every iteration, by whether the hook was at work."""
    drawn = figures.new_figure((11, 3.2))
    axes = drawn.subplots()
    interval = report['interval']
    for index, block in enumerate(report['blocks']):
        on, first = block['with_hook'], index * interval
        iterations = range(first, first + interval)
        axes.plot(
            iterations,
            block['wall_ms'],
            color=figures.STYLES['torch' if on else 'naive']['color'],
            linewidth=0.8,
            label='with the hook' if on else 'without the hook',
        )
    sampled = [i for i, b in enumerate(report['blocks']) if b['with_hook']]
    points = [(i * interval, report['blocks'][i]['wall_ms'][0]) for i in sampled]
    look = dict(linestyle='', marker='o', color='black', label='sampled by the hook')
    axes.plot(*zip(*points, strict=True), **look)
    for x, ms in points:
        figures.write_value(axes, ms, x, ms, xytext=(0, 6), ha='center', va='bottom')
    axes.set_xlabel('iteration')
    axes.set_ylabel('ms an iteration, wall clock')
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.grid(axis='y', alpha=0.3)
    figures.legend(drawn)
    env, record = report['environment'], report['summary']['wall']
    drawn.suptitle(
        f'RuntimeBenchmarkHook, {env["device"]}, {threads_text(env)}: '
        f'{_percent(record["samples"])} by samples'
    )
    return drawn
