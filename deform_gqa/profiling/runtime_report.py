"""Records of the runtime-benchmark hook: summaries, Markdown and the JSON file.

A sample is a dict, times in milliseconds::

    {'iter': 61, 'total_ms': 412.0,
     'phases_ms': {'data': 3.1, 'preprocess': 0.4, 'forward': 160.2, ...},
     'modules': {'DeformableGQA': {'forward_ms': 31.0, 'backward_ms': 52.3,
                                   'calls': 5}, ...}}

The phases add up to ``total_ms``, the modules are within forward and backward.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .markdown import markdown_table, number
from .timing import Timing

FORMAT_VERSION = 1
JSON_NAME = 'runtime_benchmark.json'
MARKDOWN_NAME = 'runtime_benchmark.md'
_VERSIONS = ('torch', 'mmengine', 'triton', 'cuda', 'python', 'deform_gqa', 'commit')
_STATISTICS = ('median ms', 'p20 - p80 ms', 'mean ms', 'share of iteration')


def load_runs(path: Path) -> list[dict[str, Any]]:
    """The runs that a file holds; none if there is no file.

    Raises:
        ValueError: If the file is something else than such a report.
    """
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is no JSON file: {error}') from error
    version = record.get('format_version') if isinstance(record, dict) else None
    if version != FORMAT_VERSION or 'runs' not in record:
        raise ValueError(
            f'{path} is no runtime benchmark of format version {FORMAT_VERSION}'
        )
    return record['runs']


def to_json(runs: Sequence[dict[str, Any]]) -> str:
    """The text of the JSON file."""
    record = dict(format_version=FORMAT_VERSION, runs=[_with_summary(r) for r in runs])
    return json.dumps(record, indent=1) + '\n'


def _with_summary(run: dict[str, Any]) -> dict[str, Any]:
    samples = run['samples']
    summary = {mode: summarize(taken) for mode, taken in samples.items() if taken}
    return {**run, 'summary': summary, 'samples': samples}


def summarize(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians, quantiles, means and shares over the samples of one mode.

    A share is a part of the sum of all iterations, so that phases which some
    iterations lack, as the optimizer's under gradient accumulation, count as often as
    they occur.

    Raises:
        ValueError: If there are no samples.
    """
    totals = [sample['total_ms'] for sample in samples]
    whole = sum(totals)
    phases = {
        name: _statistics([sample['phases_ms'][name] for sample in samples], whole)
        for name in samples[0]['phases_ms']
    }
    names = dict.fromkeys(name for sample in samples for name in sample['modules'])
    modules = {name: _summarize_modules(samples, name) for name in names}
    return dict(
        count=len(samples),
        total=_statistics(totals, whole),
        phases=phases,
        modules=modules,
    )


def _summarize_modules(samples: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """One group, over the samples that have it: hooks may exchange modules."""
    members = [sample for sample in samples if name in sample['modules']]
    whole = sum(sample['total_ms'] for sample in members)
    times = [sample['modules'][name] for sample in members]
    record: dict[str, Any] = dict(calls=max(time['calls'] for time in times))
    for direction in ('forward', 'backward'):
        taken = [time[f'{direction}_ms'] for time in times]
        record[direction] = _statistics(taken, whole)
    return record


def _statistics(samples_ms: Sequence[float], whole_ms: float) -> dict[str, float]:
    timing = Timing(tuple(samples_ms))
    return dict(
        median_ms=timing.median_ms,
        p20_ms=timing.p20_ms,
        p80_ms=timing.p80_ms,
        mean_ms=timing.mean_ms,
        share=sum(samples_ms) / whole_ms if whole_ms else 0.0,
    )


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """All runs of a file, the newest first."""
    parts = ['# Runtime']
    for run in reversed(runs):
        parts += _run_parts(run)
    return '\n\n'.join(parts) + '\n'


def _run_parts(run: dict[str, Any]) -> list[str]:
    env = run['environment']
    versions = ', '.join(f'{name} {env[name]}' for name in _VERSIONS if env.get(name))
    device = [env['device'], _counted(env['world_size'], 'process', 'es')]
    if env['device_type'] == 'cpu':
        device.append(_counted(env['threads'], 'thread'))
    parts = [
        f'## {run["name"]}, {run["started"]}',
        f'{", ".join(device)}. {versions}. Load average before: '
        f'{env["load_average"]} on {env["cpu_count"]} cores.',
    ]
    for mode, samples in run['samples'].items():
        if samples:
            parts += _mode_parts(mode, run['every'][mode], summarize(samples))
    if len(parts) == 2:
        parts.append('No iteration was sampled.')
    return parts


def _mode_parts(mode: str, every: int, summary: dict[str, Any]) -> list[str]:
    count = _counted(summary['count'], 'sampled iteration')
    rows = [[name, *_cells(stats)] for name, stats in summary['phases'].items()]
    rows.append(['iteration', *_cells(summary['total'])])
    parts = [
        f'### {mode}: {count}, one in {every}',
        markdown_table(('phase', *_STATISTICS), rows),
    ]
    rows = [
        [name, str(record['calls']), direction, *_cells(record[direction])]
        for name, record in summary['modules'].items()
        for direction in ('forward', 'backward')
        if record[direction]['mean_ms'] > 0
    ]
    if rows:
        header = ('modules', 'calls', 'direction', *_STATISTICS)
        parts += ['Within forward and backward:', markdown_table(header, rows)]
    silent = [name for name, x in summary['modules'].items() if not x['calls']]
    if silent:
        parts.append(f'Never called, or called without hooks: {", ".join(silent)}.')
    return parts


def _cells(stats: dict[str, float]) -> list[str]:
    return [
        number(stats['median_ms']),
        f'{number(stats["p20_ms"])} - {number(stats["p80_ms"])}',
        number(stats['mean_ms']),
        f'{100 * stats["share"]:.1f} %',
    ]


def _counted(count: int, name: str, plural: str = 's') -> str:
    return f'{count} {name}{"" if count == 1 else plural}'
