"""Time and memory over the number of kv heads, as a table and a picture.

Cases of such a report have the field 'kv heads' as a number, and its options say
'heads', the number of query heads, and 'subject'.
"""

from collections.abc import Sequence

from deform_gqa.profiling.markdown import number, records_table

from . import figures
from .report import Report, Row
from .tables import document, memory_text, missing_lines, spread, title

_HEADROOM = 1.15
_PANEL_INCHES = 2.6
NOTES = (
    'One sample of each number of kv heads in turn, so that drift of the machine hits '
    'all alike. `forward` runs without gradients (prediction, for a detector); `train` '
    'is forward and backward. Memory is the peak during a call over the use before '
    'it; for a bare op, with the tensors that it is called with. MHA has as many kv '
    'heads as query heads, MQA has one. A backbone has in each stage the largest '
    "divisor of the stage's heads up to the number."
)


def kv_heads_of(report: Report) -> dict[str, int]:
    """Number of kv heads by case."""
    return {case['name']: case['kv heads'] for case in report.cases}


def _mha(report: Report, row: Row) -> Row | None:
    """The row with as many kv heads as query heads."""
    for case, count in kv_heads_of(report).items():
        if count == report.options['heads']:
            return report.row(case, row.backend, row.direction)
    return None


def kv_markdown(report: Report) -> str:
    """The whole report."""
    rows = [row for row in report.rows if row.timing is not None]
    return document(
        report,
        'GQA sweep',
        f'{report.options["subject"]}.',
        NOTES,
        records_table([_record(report, row) for row in rows]),
        missing_lines(report.rows),
    )


def _record(report: Report, row: Row) -> dict[str, str]:
    timing, memory = row.timing, row.peak_memory_mib
    params = {case['name']: case['params'] for case in report.cases}[row.case]
    mha = _mha(report, row)
    faster = smaller = ''
    if mha is not None:
        faster = f'{mha.timing.median_ms / timing.median_ms:.2f}x'
        if memory and mha.peak_memory_mib:
            smaller = f'{mha.peak_memory_mib / memory:.2f}x'
    return {
        'direction': row.direction,
        'backend': row.backend,
        'kv heads': str(kv_heads_of(report)[row.case]),
        'median ms': number(timing.median_ms),
        'p20 - p80 ms': spread(timing),
        'MHA time / this': faster,
        'peak memory MiB': memory_text(memory),
        'MHA memory / this': smaller,
        'M parameters': number(params / 1e6) if params else '',
        'GFLOP': number(row.work['flops'] / 1e9),
    }


def kv_figure(report: Report):
    """Time on the left, memory on the right: curves over kv heads, MHA and MQA lines.

    Raises:
        ValueError: If nothing was measured.
    """
    measured = [row for row in report.rows if row.timing is not None]
    if not measured:
        raise ValueError('nothing was measured')
    directions = list(dict.fromkeys(row.direction for row in measured))
    figure = figures.new_figure((11, _PANEL_INCHES * len(directions) + 1.2))
    axes = figure.subplots(len(directions), 2, squeeze=False)
    for (left, right), direction in zip(axes, directions, strict=True):
        rows = [row for row in measured if row.direction == direction]
        for backend in dict.fromkeys(row.backend for row in rows):
            chosen = [row for row in rows if row.backend == backend]
            _draw(left, report, backend, times_of(report, chosen))
            _draw(right, report, backend, memory_of(report, chosen))
        _finish(left, report, f'{direction}: time', figures.TIME_UNIT)
        _finish(right, report, f'{direction}: memory', figures.MEMORY_UNIT)
    figures.legend(figure, order=lambda label: label.split(', ')[::-1])
    figure.suptitle(f'{report.options["subject"]}\n{title(report)}')
    return figure


# (kv heads, value, how far it reaches below, and above)
Points = list[tuple[int, float, float, float]]


def times_of(report: Report, rows: Sequence[Row]) -> Points:
    """Medians, with what lies between p20 and p80."""
    counts, points = kv_heads_of(report), []
    for row in rows:
        median = row.timing.median_ms
        below, above = median - row.timing.p20_ms, row.timing.p80_ms - median
        points.append((counts[row.case], median, below, above))
    return points


def memory_of(report: Report, rows: Sequence[Row]) -> Points:
    counts = kv_heads_of(report)
    peaks = {counts[row.case]: row.peak_memory_mib for row in rows}
    return [(count, mib, 0, 0) for count, mib in peaks.items() if mib is not None]


def _draw(axes, report: Report, backend: str, points: Points) -> None:
    """One backend's curve, and a line through its MHA and its MQA value."""
    look = figures.style(backend)
    if points:
        counts, values, *yerr = zip(*points, strict=True)
        label = f'GQA, {backend}'
        axes.errorbar(counts, values, yerr=yerr, label=label, ms=5, **look)
    lines = {report.options['heads']: ('MHA', '--'), 1: ('MQA', ':')}
    for count, value, _, above in points:
        place = dict(xytext=(0, 4), ha='center', va='bottom')
        figures.write_value(axes, value, count, value + above, **place)
        if count in lines:
            name, dashes = lines[count]
            line = dict(color=look['color'], ls=dashes, lw=1)
            axes.axhline(value, label=f'{name}, {backend}', **line)


def _finish(axes, report: Report, heading: str, unit: str) -> None:
    from matplotlib.ticker import NullLocator

    counts = sorted(kv_heads_of(report).values())
    axes.set_xscale('log', base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    # From 0, so that a saving looks as large as it is.
    axes.set_ylim(0, axes.get_ylim()[1] * _HEADROOM)
    axes.set_xlabel(f'kv heads (of {report.options["heads"]} query heads)')
    axes.set_ylabel(unit)
    axes.set_title(heading)
    axes.grid(alpha=0.3)
