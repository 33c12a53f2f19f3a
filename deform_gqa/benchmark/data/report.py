"""Data time as tables and a picture."""

from deform_gqa.profiling.markdown import number, records_table

from ..core import figures
from ..core.cases import BATCH, TRANSFORM
from ..core.report import Report, Row
from ..core.tables import document, spread, title

NOTES = (
    'A batch is timed from request to arrival, as a training loop waits for it; with '
    'workers some arrive at once and others late, so images/s is all images over all '
    'time. `first batch` includes starting the workers. Transforms are timed one by '
    'one in a single process without workers.'
)
_BAR_INCHES = 0.3


def _rows(report: Report, direction: str) -> list[tuple[dict, Row]]:
    """(case, row) of batches or of transforms."""
    cases = {case['name']: case for case in report.cases}
    return [(cases[r.case], r) for r in report.rows if r.direction == direction]


def images_per_second(row: Row) -> float:
    """All images over all time."""
    return row.work['images'] / row.timing.mean_ms * 1e3


def dataloader_markdown(report: Report) -> str:
    """The whole report."""
    parts = (NOTES, '## Batches', batch_table(report))
    transforms = ('## Transforms', transform_table(report))
    return document(report, 'Data', *parts, *transforms)


def batch_table(report: Report) -> str:
    return records_table(
        [
            {
                'batch': str(case['batch']),
                'workers': str(case['workers']),
                'images/s': number(images_per_second(row)),
                'mean ms': number(row.timing.mean_ms),
                'median ms': number(row.timing.median_ms),
                'p20 - p80 ms': spread(row.timing),
                'first batch ms': number(case['first_batch_ms']),
                'images of the data set': str(case['dataset_images']),
            }
            for case, row in _rows(report, BATCH)
        ]
    )


def transform_table(report: Report) -> str:
    rows = _rows(report, TRANSFORM)
    total = sum(row.timing.mean_ms for _, row in rows)
    records = [
        {
            'transform': case['transform'],
            'mean ms an image': number(row.timing.mean_ms),
            'median ms': number(row.timing.median_ms),
            'p20 - p80 ms': spread(row.timing),
            'share': f'{row.timing.mean_ms / total:.0%}',
        }
        for case, row in rows
    ]
    whole = {'transform': 'all', 'mean ms an image': number(total), 'share': '100%'}
    return records_table([*records, whole])


def dataloader_figure(report: Report):
    """Images a second on the left, milliseconds of each transform on the right."""
    batches, transforms = _rows(report, BATCH), _rows(report, TRANSFORM)
    height = _BAR_INCHES * max(len(batches), len(transforms)) + 1.6
    figure = figures.new_figure((11, height))
    left, right = figure.subplots(1, 2)
    labels = [f'batch {c["batch"]}, {c["workers"]} workers' for c, _ in batches]
    values = [images_per_second(row) for _, row in batches]
    _bars(left, labels, values, values, 'throughput', figures.STYLES['auto'])
    left.set_title('Batches')
    left.set_xlabel('images a second')
    timings = [row.timing for _, row in transforms]
    means = [timing.mean_ms for timing in timings]
    ends = [max(timing.mean_ms, timing.p80_ms) for timing in timings]
    names = [case['transform'] for case, _ in transforms]
    _bars(right, names, means, ends, 'mean', figures.STYLES['torch'])
    spreads = zip(*[(t.p20_ms, t.p80_ms) for t in timings], strict=True)
    right.hlines(range(len(names)), *spreads, color='black', label='p20 to p80')
    right.set_title('Transforms, one process')
    right.set_xlabel('ms an image')
    figures.legend(figure)
    figure.suptitle(f'Data time\n{title(report)}')
    return figure


def _bars(axes, labels, values, ends, label: str, style: dict[str, str]) -> None:
    """Bars from the top; each value stands right of the end of its marks."""
    ys = range(len(labels))
    axes.barh(ys, values, color=style['color'], height=0.6, label=label)
    for y, value, end in zip(ys, values, ends, strict=True):
        figures.write_value(axes, value, end, y)
    axes.set_xlim(0, 1.15 * max(ends))
    axes.set_yticks(ys, labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis='x', alpha=0.3)
