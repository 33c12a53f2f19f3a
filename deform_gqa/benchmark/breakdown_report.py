"""A backbone's parts as tables and a picture, the backends side by side."""

from collections.abc import Sequence
from typing import Any

from . import panels
from .breakdown import ALL
from .model_report import split_labels
from .report import Report, Row
from .tables import environment_lines, markdown_table, missing_lines, number, title

NOTES = (
    'Times of a part are those of its modules in a running model, forward and (in '
    '`train`) backward together; `rest` is what lies between them. Memory of a part is '
    'the largest peak of one of its calls over the use at its start, so parts do not '
    'add up; that of `all` is the peak of the whole call. One sample of all parts a '
    'call, medians over the samples.'
)
STAGE = 'stage '


def breakdown_markdown(report: Report) -> str:
    """For every case and direction: by type of block, and by stage."""
    parts = [
        f'# Breakdown: {title(report)}',
        f'`{report.command}`',
        *environment_lines(report),
        NOTES,
    ]
    for heading, cases in subjects(report).items():
        for direction in report.options['directions']:
            rows = [row for row in report.rows if row.direction == direction]
            parts.append(f'## {heading}: {direction}')
            for by_stage in (False, True):
                chosen = [c for c in cases if c['part'].startswith(STAGE) == by_stage]
                if chosen:
                    parts.append(part_table(chosen, rows))
    missing = missing_lines(report.rows)
    if missing is not None:
        parts.append(missing)
    return '\n\n'.join(parts) + '\n'


def subjects(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Cases by the backbone and shape that they are parts of."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in report.cases:
        heading = f'{case["backbone"]}, {case["image"]} px, batch {case["batch"]}'
        if case['kv heads']:
            heading += f', {case["kv heads"]} kv heads'
        found.setdefault(heading, []).append(case)
    return found


def part_table(cases: Sequence[dict[str, Any]], rows: Sequence[Row]) -> str:
    """A line a part; median ms and MiB of each backend, ratios of first to last."""
    names = {case['name'] for case in cases}
    found = {(row.case, row.backend): row for row in rows if row.case in names}
    backends = list(dict.fromkeys(backend for _, backend in found))
    header = ['part', 'calls', *(f'{name} ms' for name in backends)]
    header += ['ratio', *(f'{name} MiB' for name in backends), 'ratio']
    lines = []
    for case in cases:
        chosen = [found.get((case['name'], backend)) for backend in backends]
        times = [row.timing.median_ms if row else None for row in chosen]
        peaks = [row.peak_memory_mib if row else None for row in chosen]
        cells = [case['part'], str(case['calls'])]
        lines.append([*cells, *_side_by_side(times), *_side_by_side(peaks)])
    if len(backends) == 1:
        kept = [i for i, name in enumerate(header) if name != 'ratio']
        header = [header[i] for i in kept]
        lines = [[line[i] for i in kept] for line in lines]
    return markdown_table(header, lines)


def _side_by_side(values: Sequence[float | None]) -> list[str]:
    """Each value, then how many times the last the first is."""
    cells = ['' if value is None else number(value) for value in values]
    first, last = values[0], values[-1]
    return [*cells, f'{number(first / last)}x' if first and last else '']


def breakdown_figure(report: Report, heading: str):
    """Time and memory of one backbone by type of block; stages are in the tables."""
    cases = [c for c in subjects(report)[heading] if not c['part'].startswith(STAGE)]
    cases.sort(key=lambda case: case['part'] != ALL)
    rows = [row for row in report.rows if row.timing is not None]
    backends = {row.backend for row in rows}
    directions = report.options['directions']
    points = len(cases) * (len(backends) + 1)
    figure = panels.new_figure(panels.figure_inches(points, len(directions)))
    labels = split_labels(cases, ['part'])[1]
    names = [case['name'] for case in cases]
    panels.time_and_memory_panels(figure, rows, names, labels, directions)
    figure.suptitle(f'{heading}: parts\n{title(report)}')
    return figure
