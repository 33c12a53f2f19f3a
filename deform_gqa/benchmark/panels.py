"""Parts that the pictures of all suites are made of."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .report import Row

# Colours of the colour-blind-safe palette of Okabe and Ito; markers for print.
STYLES: dict[str, dict[str, str]] = {
    'naive': dict(color='#777777', marker='s'),
    'torch': dict(color='#0072B2', marker='o'),
    'triton': dict(color='#D55E00', marker='D'),
    'sdpa-bias': dict(color='#E69F00', marker='^'),
    'flex': dict(color='#009E73', marker='v'),
    'auto': dict(color='#56B4E9', marker='P'),
}
OTHER_STYLE = dict(color='#CC79A7', marker='X')
FLOOR_LABEL = 'floor of this GPU'
DPI = 130
_INCHES_PER_POINT = 0.13
_MIN_PANEL_INCHES = 2.0
_ROOM_INCHES = 1.6
_PAGE_MIB = 4 / 1024
_LEAST_SPAN = 8  # of an axis, largest over smallest value: shows two ticks or more
_FEW_DECADES = 300  # so that ticks at 1, 2 and 5 have room
_BAND = 0.7  # of the distance between two cases


def unavailable_reason() -> str | None:
    """Why there will be no picture, or None."""
    if importlib.util.find_spec('matplotlib') is None:
        return 'no pictures: the package matplotlib is not installed'
    return None


def style(backend: str) -> dict[str, str]:
    """Colour and marker of a backend, the same in every picture."""
    return STYLES.get(backend, OTHER_STYLE)


def new_figure(size: tuple[float, float]):
    """An empty figure of ``size`` inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(size, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


class Panel:
    """One axes, logarithmic: a point for every case and backend."""

    def __init__(self, axes, rows: Sequence[Row], cases: Sequence[str]):
        """``rows`` of one direction; ``cases`` are the names to draw, in order."""
        self.axes = axes
        self.cases = cases
        self.rows = {
            (row.case, row.backend): row for row in rows if row.timing is not None
        }
        self.backends = list(dict.fromkeys(backend for _, backend in self.rows))

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
                row = self.rows.get((case, backend))
                if row is not None:
                    yield index + (number - (len(self.backends) - 1) / 2) * height, row

    def _point(self, place: float, value: float, row: Row, xerr=None) -> None:
        self.axes.errorbar(
            value,
            place,
            xerr=xerr,
            label=row.backend,
            ls='',
            ms=5,
            **style(row.backend),
        )

    def _floor(self, index: int, case: str) -> None:
        rows = [self.rows.get((case, backend)) for backend in self.backends]
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
        room = max(1.0, (_LEAST_SPAN * low / high) ** 0.5)
        low, high = low / room, high * room
        axes.set_xlim(low, high)
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


def legend(figure, order: Callable[[str], Any] | None = None) -> None:
    """One legend for all axes, below them, each label once; ``order`` sorts them."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = list(entries) if order is None else sorted(entries, key=order)
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc='outside lower center', ncols=6)


def time_and_memory_panels(
    figure,
    rows: Sequence[Row],
    cases: Sequence[str],
    labels: Sequence[str],
    directions: Sequence[str],
) -> None:
    """Time on the left, memory on the right, a line of panels for each direction."""
    panels = figure.subplots(len(directions), 2, squeeze=False, sharey=True)
    for (left, right), direction in zip(panels, directions, strict=True):
        chosen = [row for row in rows if row.direction == direction]
        time = Panel(left, chosen, cases)
        time.draw_times()
        time.finish(f'{direction}: time', 'ms a call (median, p20 to p80)', labels)
        memory = Panel(right, chosen, cases)
        memory.draw_memory()
        memory.finish(f'{direction}: extra memory', 'MiB at the peak', labels)
    legend(figure)


def figure_inches(points: int, directions: int) -> tuple[float, float]:
    """Width and height of a figure with that many points in each panel."""
    panel = max(_MIN_PANEL_INCHES, points * _INCHES_PER_POINT)
    return 12, panel * directions + _ROOM_INCHES
