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
            _draw_times(left, report, chosen)
            _draw_memory(right, report, chosen)
        _finish(left, report, f'{direction}: time', figures.TIME_UNIT)
        _finish(right, report, f'{direction}: memory', figures.MEMORY_UNIT)
    figures.legend(figure, order=lambda label: label.split(', ')[::-1])
    figure.suptitle(f'{report.options["subject"]}\n{title(report)}')
    return figure


def _draw_times(axes, report: Report, rows: Sequence[Row]) -> None:
    values = [row.timing.median_ms for row in rows]
    below = [row.timing.median_ms - row.timing.p20_ms for row in rows]
    above = [row.timing.p80_ms - row.timing.median_ms for row in rows]
    _draw(axes, report, rows, values, yerr=[below, above])


def _draw_memory(axes, report: Report, rows: Sequence[Row]) -> None:
    rows = [row for row in rows if row.peak_memory_mib is not None]
    _draw(axes, report, rows, [row.peak_memory_mib for row in rows])


def _draw(axes, report: Report, rows: Sequence[Row], values, yerr=None) -> None:
    """One backend's curve, and a line through its MHA and its MQA value."""
    if not rows:
        return
    backend = rows[0].backend
    counts = [kv_heads_of(report)[row.case] for row in rows]
    look = figures.style(backend)
    axes.errorbar(counts, values, yerr=yerr, label=f'GQA, {backend}', ms=5, **look)
    tops = yerr[1] if yerr else [0.0] * len(values)
    for count, value, top in zip(counts, values, tops, strict=True):
        above = dict(xytext=(0, 4), ha='center', va='bottom')
        figures.write_value(axes, value, count, value + top, **above)
    lines = ((report.options['heads'], 'MHA', '--'), (1, 'MQA', ':'))
    for count, name, dashes in lines:
        if count in counts:
            value = values[counts.index(count)]
            axes.axhline(
                value, color=look['color'], ls=dashes, lw=1, label=f'{name}, {backend}'
            )


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
