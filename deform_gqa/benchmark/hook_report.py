"""What ``benchmark.py hook-overhead`` writes."""

import json
from pathlib import Path
from typing import Any

from . import panels
from .tables import markdown_table, number

NAME = 'hook-overhead'


def save(report: dict[str, Any], out_dir: Path) -> None:
    """Writes the JSON, Markdown and, where matplotlib is installed, PNG."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / f'{NAME}.json').write_text(json.dumps(report, indent=1) + '\n')
    (out_dir / f'{NAME}.md').write_text(markdown(report))
    names = [f'{NAME}.json', f'{NAME}.md']
    reason = panels.unavailable_reason()
    if reason is None:
        figure(report).savefig(out_dir / f'{NAME}.png', dpi=panels.DPI)
        names.append(f'{NAME}.png')
    print(f'written to {out_dir}: {", ".join(names)}')
    if reason is not None:
        print(reason)


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env, interval = report['environment'], report['interval']
    rows = []
    for clock, record in report['summary'].items():
        cells = [_percent(record[name]) for name in ('samples', 'blocks', 'noise')]
        rows.append([clock, number(record['iteration_ms']), *cells])
    header = ('clock', 'iteration ms', 'overhead by samples', 'overhead by blocks')
    table = markdown_table((*header, 'block without after block without'), rows)
    parts = [
        '# Overhead of RuntimeBenchmarkHook',
        f'`{report["command"]}`',
        f'{env["device"]}, {env["threads"]} threads, torch {env["torch"]}, commit '
        f'{env["commit"]}, {env["date"]}. Load average: {env["load_average"]} on '
        f'{env["cpu_count"]} cores.',
        f'{report["config"]}: {len(report["blocks"])} blocks of {interval} '
        'iterations; half of them have the hook, which samples their first iteration. '
        'Medians, and p20 to p80 in brackets.',
        table,
    ]
    return '\n\n'.join(parts) + '\n'


def _percent(spread: dict[str, float] | None) -> str:
    if spread is None:
        return ''
    low, middle, high = (100 * spread[name] for name in ('p20', 'median', 'p80'))
    return f'{middle:+.2f} % ({low:+.2f} to {high:+.2f})'


def figure(report: dict[str, Any]):
    """Wall-clock time of every iteration, by whether the hook was at work."""
    drawn = panels.new_figure((10, 4))
    axes = drawn.subplots()
    interval = report['interval']
    for index, block in enumerate(report['blocks']):
        on, first = block['with_hook'], index * interval
        places = range(first, first + interval)
        axes.plot(
            places,
            block['wall_ms'],
            color=panels.STYLES['torch' if on else 'naive']['color'],
            linewidth=0.8,
            label='with the hook' if on else 'without the hook',
        )
    sampled = [i for i, b in enumerate(report['blocks']) if b['with_hook']]
    axes.plot(
        [i * interval for i in sampled],
        [report['blocks'][i]['wall_ms'][0] for i in sampled],
        linestyle='',
        marker='o',
        color='black',
        label='sampled by the hook',
    )
    axes.set_xlabel('iteration')
    axes.set_ylabel('ms an iteration, wall clock')
    axes.set_ylim(bottom=0)
    axes.grid(axis='y', alpha=0.3)
    panels.legend(drawn)
    env, record = report['environment'], report['summary']['wall']
    drawn.suptitle(
        f'RuntimeBenchmarkHook, {env["device"]}, {env["threads"]} threads: '
        f'{_percent(record["samples"])} by samples'
    )
    return drawn
