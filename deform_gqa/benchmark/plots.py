"""A report as pictures: time and memory of every case, by backend."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .op_peers import BACKENDS
from .report import Report, Row
from .sdpa_cases import OP as SDPA
from .tables import title

# Colours of the colour-blind-safe palette of Okabe and Ito; markers for print.
STYLES = dict(
    zip(
        BACKENDS,
        (
            dict(color='#777777', marker='s'),
            dict(color='#0072B2', marker='o'),
            dict(color='#D55E00', marker='D'),
            dict(color='#E69F00', marker='^'),
            dict(color='#009E73', marker='v'),
        ),
        strict=True,
    )
)
_INCHES_PER_POINT = 0.13
_MIN_PANEL_INCHES = 2.0
_ROOM_INCHES = 1.6
FLOOR_LABEL = 'floor of this GPU'
_PAGE_MIB = 4 / 1024
_FEW_DECADES = 300  # so that ticks at 1, 2 and 5 have room
_BAND = 0.7  # of the distance between two cases


def unavailable_reason() -> str | None:
    """Why there will be no picture, or None."""
    if importlib.util.find_spec('matplotlib') is None:
        return 'no pictures: the package matplotlib is not installed'
    return None


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


class _Panel:
    """One axes, logarithmic: a point for every case and backend."""

    def __init__(self, axes, report: Report, cases: Sequence[dict], direction: str):
        self.axes = axes
        self.cases = cases
        self.rows = {
            (row.case, row.backend): row
            for row in report.rows
            if row.direction == direction and row.timing is not None
        }
        used = {backend for _, backend in self.rows}
        self.backends = [name for name in BACKENDS if name in used]

    def draw_times(self) -> None:
        """Medians, with whiskers from p20 to p80, and the floors where known."""
        for place, row in self._places():
            timing = row.timing
            if timing is not None:
                below = timing.median_ms - timing.p20_ms
                above = timing.p80_ms - timing.median_ms
                self._point(place, timing.median_ms, row, [[below], [above]])
        for index, case in enumerate(self.cases):
            self._floor(index, case)

    def draw_memory(self) -> None:
        """Peaks; a call that takes less than a page stands at a page."""
        for place, row in self._places():
            if row.peak_memory_mib is not None:
                self._point(place, max(row.peak_memory_mib, _PAGE_MIB), row)

    def _places(self) -> Iterator[tuple[float, Row]]:
        height = _BAND / max(len(self.backends), 1)
        for index, case in enumerate(self.cases):
            for number, backend in enumerate(self.backends):
                row = self.rows.get((case['name'], backend))
                if row is not None:
                    yield index + (number - (len(self.backends) - 1) / 2) * height, row

    def _point(self, place: float, value: float, row: Row, xerr=None) -> None:
        style = STYLES[row.backend]
        self.axes.errorbar(
            value, place, xerr=xerr, label=row.backend, ls='', ms=5, **style
        )

    def _floor(self, index: int, case: dict) -> None:
        rows = [self.rows.get((case['name'], backend)) for backend in self.backends]
        floors = [row.least_us for row in rows if row is not None and row.least_us]
        if floors:
            ends = (index - _BAND / 2, index + _BAND / 2)
            self.axes.vlines(floors[0] / 1e3, *ends, color='black', label=FLOOR_LABEL)

    def finish(self, heading: str, unit: str, labels: Sequence[str]) -> None:
        """Scales and texts."""
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes = self.axes
        axes.set_xscale('log')
        low, high = axes.get_xlim()
        steps = (1.0, 2.0, 5.0) if high / low < _FEW_DECADES else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(heading)
        axes.set_xlabel(unit)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)  # the first case on top
        axes.grid(axis='x', alpha=0.3)
        for index in range(0, len(labels), 2):
            axes.axhspan(index - 0.5, index + 0.5, color='black', alpha=0.04, lw=0)


def _legend(figure, panels) -> None:
    entries: dict[str, Any] = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()), list(entries), loc='outside lower center', ncols=6
    )


def op_figure(report: Report, op: str):
    """Time on the left, memory on the right, a line of panels for each direction.

    Raises:
        ValueError: If nothing was measured of ``op``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = {row.case: row for row in report.rows if row.timing is not None}
    cases = [c for c in report.cases if c['op'] == op and c['name'] in measured]
    if not cases:
        raise ValueError(f'nothing was measured of {op}')
    directions = report.options['directions']
    points = len(cases) * (len(report.options['backends']) + 1)
    panel_inches = max(_MIN_PANEL_INCHES, points * _INCHES_PER_POINT)
    size = (12, panel_inches * len(directions) + _ROOM_INCHES)
    figure = Figure(size, layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(directions), 2, squeeze=False, sharey=True)
    shared, labels = split_labels(cases)
    for (left, right), direction in zip(panels, directions, strict=True):
        time = _Panel(left, report, cases, direction)
        time.draw_times()
        time.finish(f'{direction}: time', 'ms a call (median, p20 to p80)', labels)
        memory = _Panel(right, report, cases, direction)
        memory.draw_memory()
        memory.finish(f'{direction}: extra memory', 'MiB at the peak', labels)
    _legend(figure, panels)
    figure.suptitle(f'{op}: {shared}\n{title(report)}')
    return figure


def save_op_figures(report: Report, out_dir: Path) -> list[Path]:
    """One PNG an op of which something was measured."""
    measured = {row.case for row in report.rows if row.timing is not None}
    ops = [case['op'] for case in report.cases if case['name'] in measured]
    paths = []
    for op in dict.fromkeys(ops):
        paths.append(out_dir / f'{op}.png')
        op_figure(report, op).savefig(paths[-1], dpi=130)
    return paths
