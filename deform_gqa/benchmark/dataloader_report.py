"""Data time as tables and a picture."""

from . import panels
from .report import Report, Row
from .tables import environment_lines, markdown_table, number, title

BATCH, TRANSFORM = 'batch', 'transform'
NOTES = (
    'A batch is timed from request to arrival, as a training loop waits for it; with '
    'workers some arrive at once and others late, so images/s is all images over all '
    'time. `first batch` includes starting the workers. Transforms are timed one by '
    'one in a single process without workers.'
)


def _cases(report: Report) -> dict[str, dict]:
    return {case['name']: case for case in report.cases}


def _rows(report: Report, direction: str) -> list[Row]:
    return [row for row in report.rows if row.direction == direction]


def images_per_second(row: Row) -> float:
    """All images over all time."""
    samples = row.timing.samples_ms
    return row.work['images'] * len(samples) / sum(samples) * 1e3


def mean_ms(row: Row) -> float:
    samples = row.timing.samples_ms
    return sum(samples) / len(samples)


def dataloader_markdown(report: Report) -> str:
    """The whole report."""
    parts = [
        f'# Data: {title(report)}',
        f'`{report.command}`',
        *environment_lines(report),
        NOTES,
        '## Batches',
        batch_table(report),
        '## Transforms',
        transform_table(report),
    ]
    return '\n\n'.join(parts) + '\n'


def batch_table(report: Report) -> str:
    header = ('batch', 'workers', 'images/s', 'mean ms', 'median ms', 'p20 - p80 ms')
    header += ('first batch ms', 'images of the data set')
    cases, lines = _cases(report), []
    for row in _rows(report, BATCH):
        case, timing = cases[row.case], row.timing
        lines.append(
            [
                str(case['batch']),
                str(case['workers']),
                number(images_per_second(row)),
                number(mean_ms(row)),
                number(timing.median_ms),
                f'{number(timing.p20_ms)} - {number(timing.p80_ms)}',
                number(case['first_batch_ms']),
                str(case['dataset_images']),
            ]
        )
    return markdown_table(header, lines)


def transform_table(report: Report) -> str:
    rows = _rows(report, TRANSFORM)
    total = sum(mean_ms(row) for row in rows)
    lines = [
        [
            _cases(report)[row.case]['transform'],
            number(mean_ms(row)),
            number(row.timing.median_ms),
            f'{number(row.timing.p20_ms)} - {number(row.timing.p80_ms)}',
            f'{mean_ms(row) / total:.0%}',
        ]
        for row in rows
    ]
    lines.append(['all', number(total), '', '', '100%'])
    header = ('transform', 'mean ms an image', 'median ms', 'p20 - p80 ms', 'share')
    return markdown_table(header, lines)


def dataloader_figure(report: Report):
    """Images a second on the left, milliseconds of each transform on the right."""
    batches, transforms = _rows(report, BATCH), _rows(report, TRANSFORM)
    height = 0.4 * max(len(batches), len(transforms)) + 1.8
    figure = panels.new_figure((12, height))
    left, right = figure.subplots(1, 2)
    cases = _cases(report)
    labels = [
        f'batch {cases[row.case]["batch"]}, {cases[row.case]["workers"]} workers'
        for row in batches
    ]
    _bars(left, labels, [images_per_second(row) for row in batches], 'throughput')
    left.set_title('Batches')
    left.set_xlabel('images a second')
    names = [cases[row.case]['transform'] for row in transforms]
    _bars(right, names, [mean_ms(row) for row in transforms], 'mean')
    spread = [(row.timing.p20_ms, row.timing.p80_ms) for row in transforms]
    right.hlines(
        range(len(names)), *zip(*spread, strict=True), color='black', label='p20 to p80'
    )
    right.set_title('Transforms, one process')
    right.set_xlabel('ms an image')
    panels.legend(figure)
    figure.suptitle(f'Data time\n{title(report)}')
    return figure


def _bars(axes, labels: list[str], values: list[float], label: str) -> None:
    color = panels.STYLES['torch' if label == 'mean' else 'auto']['color']
    axes.barh(range(len(labels)), values, color=color, height=0.6, label=label)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis='x', alpha=0.3)
