"""Parts that the pictures of all suites are made of. Every mark carries its value."""

import importlib.util
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

from deform_gqa.profiling.markdown import number

from .fields import Fields, split_labels
from .report import Report, Row
from .tables import title

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
ROOFLINE_LABEL = 'roofline of this GPU'
DPI = 130
VALUE_SIZE = 7  # of the font
TIME_UNIT = 'ms a call (median, p20 to p80)'
MEMORY_UNIT = 'MiB at the peak'
_WIDTH_INCHES = 11
_LINE_INCHES = 0.19
_ROOM_INCHES = 1.6  # title, axes and legend
_PAGE_MIB = 4 / 1024
_LEAST_SPAN = 8  # of an axis, largest over smallest value: shows two ticks or more
_FEW_DECADES = 300  # so that ticks at 1, 2 and 5 have room
_TEXT_SHARE = 0.12  # of an axis, right of the largest value


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


def write_value(axes, value: float, x: float, y: float, **options: Any) -> None:
    """The value beside its mark; options as matplotlib's ``annotate``."""
    write_text(axes, number(value), x, y, **options)


def write_text(axes, text: str, x: float, y: float, **options: Any) -> None:
    """A small text right of a point."""
    options = dict(xytext=(5, 0), va='center', ha='left') | options
    look = dict(textcoords='offset points', fontsize=VALUE_SIZE)
    axes.annotate(text, (x, y), **look, **options)


def legend(figure, order: Callable[[str], Any] | None = None) -> None:
    """One legend for all axes, below them, each label once; ``order`` sorts them."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = list(entries) if order is None else sorted(entries, key=order)
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc='outside lower center', ncols=6)


class Slot(NamedTuple):
    """A group of marks of a picture: a case in a direction, or a heading without any.

    Lines are counted from the top; ``first`` is that of the first mark.
    """

    label: str
    rows: list[Row]
    first: int

    @property
    def ends(self) -> tuple[float, float]:
        return self.first - 0.5, self.first + max(len(self.rows), 1) - 0.5


def slots_of(report: Report, labels: Mapping[str, str]) -> list[Slot]:
    """The cases of one direction after the other; a single case has no label."""
    measured = [row for row in report.rows if row.timing is not None]
    slots: list[Slot] = []

    def add(label: str, rows: list[Row]) -> None:
        lines = sum(max(len(slot.rows), 1) for slot in slots)
        slots.append(Slot(label, rows, lines))

    directions = directions_of(report, labels)
    for direction in directions:
        if len(directions) > 1 and len(labels) > 1:
            add(direction, [])
        for case, label in labels.items():
            rows = [r for r in measured if (r.case, r.direction) == (case, direction)]
            add(label if len(labels) > 1 else direction, rows)
    return slots


def directions_of(report: Report, cases: Container[str]) -> list[str]:
    """Those in which one of the cases was measured."""
    found = {
        r.direction for r in report.rows if r.timing is not None and r.case in cases
    }
    return [name for name in report.options['directions'] if name in found]


def case_figure(report: Report, fields: Mapping[str, Fields], subject: str):
    """:func:`time_and_memory` of the cases with these fields, by the case's name."""
    shared, labels = split_labels(list(fields.values()))
    names = dict(zip(fields, labels, strict=True))
    return time_and_memory(report, names, ': '.join(filter(None, [subject, shared])))


def time_and_memory(report: Report, labels: Mapping[str, str], heading: str):
    """Time on the left, memory on the right, a mark for each measured row.

    Args:
        report: Some of its cases were measured.
        labels: What stands at the axis, by the name of the case.
        heading: First line of the title.
    """
    slots = slots_of(report, labels)
    height = slots[-1].ends[1] * _LINE_INCHES
    figure = new_figure((_WIDTH_INCHES, height + _ROOM_INCHES))
    left, right = figure.subplots(1, 2, sharey=True)
    directions = directions_of(report, labels)
    of_all = f'{directions[0]}: ' if len(directions) == 1 else ''
    _finish(left, slots, draw_times(left, slots), f'{of_all}time', TIME_UNIT)
    memory = draw_memory(right, slots)
    _finish(right, slots, memory, f'{of_all}extra memory', MEMORY_UNIT)
    legend(figure)
    figure.suptitle(f'{heading}\n{title(report)}')
    return figure


def draw_times(axes, slots: Sequence[Slot]) -> list[float]:
    """Medians, with whiskers from p20 to p80, and rooflines; all ends of marks."""
    ends: list[float] = []
    for slot in slots:
        for y, row in enumerate(slot.rows, start=slot.first):
            timing = row.timing
            whiskers = timing.p20_ms, timing.p80_ms
            _mark(axes, y, row, timing.median_ms, timing.median_ms, whiskers)
            ends += whiskers
        if slot.rows and slot.rows[0].least_us:
            x = slot.rows[0].least_us / 1e3
            axes.vlines(x, *slot.ends, color='black', label=ROOFLINE_LABEL)
            ends.append(x)
    return ends


def draw_memory(axes, slots: Sequence[Slot]) -> list[float]:
    """Peaks; a call that takes less than a page stands at a page."""
    ends: list[float] = []
    for slot in slots:
        for y, row in enumerate(slot.rows, start=slot.first):
            if row.peak_memory_mib is not None:
                ends.append(max(row.peak_memory_mib, _PAGE_MIB))
                _mark(axes, y, row, row.peak_memory_mib, ends[-1])
    return ends


def _mark(axes, y: float, row: Row, value: float, x: float, whiskers=None) -> None:
    look = dict(label=row.backend, ls='', ms=5, **style(row.backend))
    low, high = whiskers or (x, x)
    axes.errorbar(x, y, xerr=[[x - low], [high - x]], **look)
    write_value(axes, value, high, y)


def _finish(
    axes, slots: Sequence[Slot], ends: Sequence[float], heading: str, unit: str
) -> None:
    """Scales and texts."""
    axes.set_xscale('log')
    if ends:
        low, high = _limits(ends)
        axes.set_xlim(low, high)
        tick(axes, (1.0, 2.0, 5.0) if high / low < _FEW_DECADES else (1.0,))
    axes.set_title(heading)
    axes.set_xlabel(unit)
    middles = [sum(slot.ends) / 2 for slot in slots]
    axes.set_yticks(middles, [slot.label for slot in slots])
    axes.set_ylim(slots[-1].ends[1], -0.5)  # the first on top
    axes.grid(axis='x', alpha=0.3)
    headings = {slot.label for slot in slots if not slot.rows}
    for text in axes.get_yticklabels():  # none on the right, which shares them
        if text.get_text() in headings:
            text.set_fontweight('bold')
    for slot in [slot for slot in slots if slot.rows][::2]:
        axes.axhspan(*slot.ends, color='black', alpha=0.04, lw=0)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis with room for the texts beside the marks."""
    low, high = min(values), max(values)
    room = max(1.15, (_LEAST_SPAN * low / high) ** 0.5)
    low, high = low / room, high * room
    return low, high * (high / low) ** _TEXT_SHARE


def label_rows(axes, labels: Sequence[str]) -> None:
    """A label for each line of marks, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def tick(axes, steps: Sequence[float], base: float = 10) -> None:
    """Ticks of a logarithmic axis at these multiples of powers of ``base``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(base, subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
    axes.xaxis.set_minor_locator(NullLocator())
