"""A backbone's parts as tables and pictures, the backends side by side."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from deform_gqa.profiling.markdown import number, records_table

from ..core import figures
from ..core.report import Report, Row
from ..core.tables import document, missing_lines, ratio, title
from .breakdown import ALL

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
    parts: list[str | None] = [NOTES]
    for heading, cases in subjects(report).items():
        for direction in report.options['directions']:
            rows = [row for row in report.rows if row.direction == direction]
            parts.append(f'## {heading}: {direction}')
            for by_stage in (False, True):
                chosen = [c for c in cases if c['part'].startswith(STAGE) == by_stage]
                if chosen:
                    parts.append(part_table(chosen, rows))
    return document(report, 'Breakdown', *parts, missing_lines(report.rows))


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
    records = []
    for case in cases:
        chosen = [found.get((case['name'], backend)) for backend in backends]
        times = [row.timing.median_ms if row else None for row in chosen]
        peaks = [row.peak_memory_mib if row else None for row in chosen]
        records.append(
            {
                'part': case['part'],
                'calls': str(case['calls']),
                **_side_by_side('ms', backends, times),
                **_side_by_side('MiB', backends, peaks),
            }
        )
    return records_table(records)


def _side_by_side(
    unit: str, backends: Sequence[str], values: Sequence[float | None]
) -> dict[str, str]:
    """Each value, then how many times the last the first is."""
    cells = {
        f'{backend} {unit}': '' if value is None else number(value)
        for backend, value in zip(backends, values, strict=True)
    }
    if len(values) > 1:
        cells[f'{unit} ratio'] = ratio(values[0], values[-1]) if values[0] else ''
    return cells


def breakdown_pictures(report: Report) -> dict[str, Callable[[], Any]]:
    """One of each backbone and shape."""
    return {
        f'breakdown-{index}': functools.partial(breakdown_figure, report, heading)
        for index, heading in enumerate(subjects(report), start=1)
    }


def breakdown_figure(report: Report, heading: str):
    """Time and memory of one backbone by type of block; stages are in the tables."""
    cases = [c for c in subjects(report)[heading] if not c['part'].startswith(STAGE)]
    cases.sort(key=lambda case: case['part'] != ALL)
    labels = {case['name']: case['part'] for case in cases}
    return figures.time_and_memory(report, labels, f'{heading}: parts\n{title(report)}')
