"""The op suite as pictures: time and memory of every case, by backend."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .panels import DPI, figure_inches, new_figure, time_and_memory_panels
from .report import Report
from .sdpa_cases import OP as SDPA
from .tables import title


def _parts(case: dict[str, Any]) -> dict[str, str]:
    heads, kv_heads = case['num_heads'], case['num_kv_heads']
    if case['op'] == SDPA:
        height, width = case['grid_size']
        return {
            'map': f'{height}x{width}',
            'batch': f'batch {case["batch"]}',
            'kv': f'{kv_heads} of {heads} kv heads',
            'views': f'{case["views"]} views',
            'points': f'{case["points"]} points',
        }
    height, width = case['image_size']
    share = 'all kv heads' if kv_heads == heads else f'{kv_heads} of {heads} kv heads'
    return {
        'stage': f'stage {case["stage"]}',
        'image': f'{height}x{width} px',
        'batch': f'batch {case["batch"]}',
        'kv': share,
    }


def split_labels(cases: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """(what all cases share, what tells each from the others)."""
    parts = [_parts(case) for case in cases]
    shared = {
        name: text
        for name, text in parts[0].items()
        if name not in ('stage', 'points') and all(part[name] == text for part in parts)
    }
    labels = [
        ', '.join(text for name, text in part.items() if name not in shared)
        for part in parts
    ]
    return ', '.join(shared.values()), labels


def op_figure(report: Report, op: str):
    """Time on the left, memory on the right, a line of panels for each direction.

    Raises:
        ValueError: If nothing was measured of ``op``.
    """
    measured = {row.case: row for row in report.rows if row.timing is not None}
    cases = [c for c in report.cases if c['op'] == op and c['name'] in measured]
    if not cases:
        raise ValueError(f'nothing was measured of {op}')
    directions = report.options['directions']
    points = len(cases) * (len(report.options['backends']) + 1)
    figure = new_figure(figure_inches(points, len(directions)))
    shared, labels = split_labels(cases)
    names = [case['name'] for case in cases]
    time_and_memory_panels(figure, report.rows, names, labels, directions)
    figure.suptitle(f'{op}: {shared}\n{title(report)}')
    return figure


def save_op_figures(report: Report, out_dir: Path) -> list[Path]:
    """One PNG an op of which something was measured."""
    measured = {row.case for row in report.rows if row.timing is not None}
    ops = [case['op'] for case in report.cases if case['name'] in measured]
    paths = []
    for op in dict.fromkeys(ops):
        paths.append(out_dir / f'{op}.png')
        op_figure(report, op).savefig(paths[-1], dpi=DPI)
    return paths
