"""The op suite as tables and pictures."""

import functools
from collections.abc import Callable
from typing import Any

from deform_gqa.profiling.markdown import number, records_table

from ..core import figures
from ..core.fields import size_text
from ..core.report import Report, Row
from ..core.tables import (
    REFERENCE,
    document,
    measured_cells,
    missing_lines,
    ratio,
)
from .case import StageCase
from .registry import OP_CASES

_NOTES = (
    'Medians over the samples; memory is the peak during a call over the use before '
    f'it. Each backend passed the comparison with `{REFERENCE}` first.'
)
_WORK_TITLE = 'Work that no implementation can leave out'
_SAMPLE_TITLE = (
    ', and what it gathers (and scatters) if it samples vectors, which is no limit: it '
    'comes from caches, and products of whole maps can replace it'
)


def op_markdown(report: Report) -> str:
    """The whole report."""
    parts: list[str | None] = [_NOTES]
    for op in dict.fromkeys(case['op'] for case in report.cases):
        rows = _rows_of(report, op)
        samples = any(row.work.get('samples') for _, row in rows)
        parts += [f'## {op}', op_table(report, op)]
        parts.append(missing_lines(row for _, row in rows))
        parts.append(_WORK_TITLE + (_SAMPLE_TITLE if samples else '') + ':')
        parts.append(work_table(report, op))
        total = totals_table(report, op)
        if total is not None:
            parts += [f'All {op} layers of DAT-T++ (layers times medians):', total]
    return document(report, 'Ops', *parts)


def _rows_of(report: Report, op: str) -> list[tuple[dict, Row]]:
    cases = {case['name']: case for case in report.cases if case['op'] == op}
    return [(cases[row.case], row) for row in report.rows if row.case in cases]


def _case_cells(case: dict) -> dict[str, str]:
    cells = {n: str(x) for n, x in OP_CASES[case['op']].fields(case).items()}
    cells['kv heads'] = f'{case["num_kv_heads"]} of {case["num_heads"]}'
    cells['queries x keys'] = f'{case["num_queries"]} x {case["keys_per_query"]}'
    return cells


def op_table(report: Report, op: str) -> str:
    """Every measured row of one op."""
    return records_table(
        [
            {
                **_case_cells(case),
                **measured_cells(report, row),
                'time / roofline': ratio(row.timing.median_ms * 1e3, row.least_us),
            }
            for case, row in _rows_of(report, op)
            if row.timing is not None
        ]
    )


def work_table(report: Report, op: str) -> str:
    """The least work of each case, and the least times on a device that is known."""
    lines = {}
    for case, row in _rows_of(report, op):
        work = row.work
        lines[row.case, row.direction] = {
            **_case_cells(case),
            'direction': row.direction,
            'M pairs': number(work['pairs'] / 1e6),
            'M exps': number(work['exps'] / 1e6),
            'GFLOP': number(work['flops'] / 1e9),
            'MB moved': number(work['bytes'] / 1e6),
            'M samples': _millions(work, 'samples'),
            'MB gathered': _millions(work, 'gathered_bytes'),
            **{f'{x} us': number(us) for x, us in (row.roofline_us or {}).items()},
        }
    return records_table(list(lines.values()))


def _millions(work: dict[str, int], name: str) -> str:
    return number(work[name] / 1e6) if work.get(name) else ''


def totals(report: Report, op: str) -> list[dict[str, Any]]:
    """All layers of a backbone together, where every stage was measured.

    Sums layers times medians over the stages; one entry per image size, batch, share
    of kv heads, direction and backend. Nothing for an op of no stage.
    """
    if not issubclass(OP_CASES[op], StageCase):
        return []
    groups: dict[tuple, list[tuple[dict, Row]]] = {}
    for case, row in _rows_of(report, op):
        heads = case['num_heads']  # 'half' and 'one' may be the same number
        for share, count in {'full': heads, 'half': heads // 2, 'one': 1}.items():
            if count == case['num_kv_heads'] and row.timing is not None:
                key = (tuple(case['image_size']), case['batch'], share)
                key += (row.direction, row.backend)
                groups.setdefault(key, []).append((case, row))
    names = ('image_size', 'batch', 'kv_heads', 'direction', 'backend')
    return [
        dict(
            zip(names, key, strict=True),
            layers=sum(case['layers'] for case, _ in members),
            ms=sum(case['layers'] * row.timing.median_ms for case, row in members),
            roofline_ms=sum(
                case['layers'] * (row.least_us or 0.0) / 1e3 for case, row in members
            ),
        )
        for key, members in groups.items()
        if {case['stage'] for case, _ in members} == set(OP_CASES[op].stages())
    ]


def totals_table(report: Report, op: str) -> str | None:
    """The totals as Markdown; None where no backend has every stage."""
    entries = totals(report, op)

    def key(entry: dict) -> tuple:
        return tuple(entry[x] for x in ('image_size', 'batch', 'kv_heads', 'direction'))

    base = {key(x): x['ms'] for x in entries if x['backend'] == REFERENCE}
    records = [
        {
            'image': size_text(x['image_size']),
            'batch': str(x['batch']),
            'kv heads': x['kv_heads'],
            'layers': str(x['layers']),
            'direction': x['direction'],
            'backend': x['backend'],
            'ms': number(x['ms']),
            f'faster than {REFERENCE}': ratio(base.get(key(x)), x['ms']),
            'roofline ms': number(x['roofline_ms']) if x['roofline_ms'] else '',
            'time / roofline': ratio(x['ms'], x['roofline_ms']),
        }
        for x in entries
    ]
    return records_table(records) if records else None


def op_pictures(report: Report) -> dict[str, Callable[[], Any]]:
    """One of each op of which something was measured."""
    measured = report.measured_cases()
    ops = dict.fromkeys(case['op'] for case in measured)
    return {op: functools.partial(op_figure, report, op) for op in ops}


def op_figure(report: Report, op: str):
    """Time on the left, memory on the right.

    Raises:
        ValueError: If nothing was measured of ``op``.
    """
    cases = [case for case in report.measured_cases() if case['op'] == op]
    if not cases:
        raise ValueError(f'nothing was measured of {op}')
    fields = {case['name']: OP_CASES[op].fields(case) for case in cases}
    return figures.case_figure(report, fields, op)
