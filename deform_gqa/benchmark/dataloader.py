"""``benchmark.py dataloader``: batches a second, and the time of each transform."""

import argparse
import contextlib
import copy
import functools
import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing

from deform_gqa.profiling.markdown import number, records_table
from deform_gqa.profiling.timing import Timing

from .core import figures
from .core.cases import BATCH, TRANSFORM
from .core.errors import OptionError
from .core.options import (
    add_output_arguments,
    number_from,
    one_of,
    parse_count,
    resolve_threads,
    use_threads,
)
from .core.progress import progress
from .core.report import Report, Row
from .core.tables import document, spread, title
from .core.writer import publish
from .models.build import load_config
from .models.options import add_cfg_options, parse_cfg_options

DESCRIPTION = 'Data time: batches of a config, and its transforms one by one.'
SPLITS = ('train', 'val', 'test')
BATCHES, QUICK_BATCHES = 50, 10
IMAGES, QUICK_IMAGES = 100, 20
WARM_UP_BATCHES = 2
READ_INFO = 'get_data_info'
LOADER = 'loader'
NOTES = (
    'A batch is timed from request to arrival, as a training loop waits for it; with '
    'workers some arrive at once and others late, so images/s is all images over all '
    'time. `first batch` includes starting the workers. Transforms are timed one by '
    'one in a single process without workers.'
)
_BAR_INCHES = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('config', metavar='CONFIG', help="a path, or 'mmdet::DIR/NAME.py'")
    splits = f'of {", ".join(SPLITS)} (default: train)'
    add('--split', type=one_of(SPLITS), default='train', help=splits)
    numbers = dict(nargs='+', metavar='N', help="default: the config's")
    add('--workers', type=number_from(0, int), **numbers)
    add('--batch-sizes', type=parse_count, **numbers)
    batches = (
        f'timed, after {WARM_UP_BATCHES} (default: {BATCHES}, {QUICK_BATCHES} if quick)'
    )
    add('--batches', type=parse_count, help=batches)
    images = (
        f'that transforms are timed with (default: {IMAGES}, {QUICK_IMAGES} if quick)'
    )
    add('--images', type=parse_count, help=images)
    add_cfg_options(parser)
    add_output_arguments(parser, quick='few batches')


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print the tables, and write the files if --out is given.

    Raises:
        OptionError: For wrong options, or data that is not there.
    """
    cfg = load_config(args.config, parse_cfg_options(args.cfg_options))
    loader_config = cfg.get(f'{args.split}_dataloader')
    if loader_config is None:
        raise OptionError(f'config {args.config!r} has no {args.split}_dataloader')
    use_threads(resolve_threads(args))
    # What a Runner does: start method, OpenCV's threads.
    set_multi_processing(**cfg.get('env_cfg', {}).get('mp_cfg', {}))
    measured = list(measure(args, loader_config))
    options = {
        'config': args.config,
        'split': args.split,
        'dtype': f'{args.split} data of {args.config.rsplit("/", 1)[-1]}',
    }
    report = Report.of(
        'dataloader',
        command,
        torch.device('cpu'),
        options,
        [case for case, _ in measured],
        [row for _, row in measured],
    )
    draw = functools.partial(dataloader_figure, report)
    text = dataloader_markdown(report)
    publish('dataloader', report.to_json(), text, args.out, {'dataloader': draw})


def measure(
    args: argparse.Namespace, config: Config
) -> Iterator[tuple[dict[str, Any], Row]]:
    """What the report says of each loader, then of each transform, and its row."""
    count = args.batches or (QUICK_BATCHES if args.quick else BATCHES)
    images = args.images or (QUICK_IMAGES if args.quick else IMAGES)
    batch_sizes = args.batch_sizes or [config.get('batch_size', 1)]
    workers = args.workers or [config.get('num_workers', 0)]
    settings = list(dict.fromkeys(itertools.product(batch_sizes, workers)))
    with progress(len(settings) + 1) as step:
        for batch, processes in settings:
            name = f'dataloader/{args.split}/b{batch}/w{processes}'
            step(name)
            loader = build_loader(config, batch, processes)
            first_ms, timing = time_batches(loader, count)
            case = dict(name=name, split=args.split, batch=batch, workers=processes)
            case |= dict(first_batch_ms=first_ms, dataset_images=len(loader.dataset))
            del loader
            yield case, _row(name, BATCH, timing, batch)
        step('transforms')
        dataset = innermost(build_loader(config, 1, 0).dataset)
        for index, (transform, timing) in enumerate(time_transforms(dataset, images)):
            name = f'transform/{index:02d}-{transform}'
            case = {'name': name, 'transform': transform}
            yield case, _row(name, TRANSFORM, timing, 1)


def _row(case: str, direction: str, timing: Timing, images: int) -> Row:
    return Row(case, LOADER, direction, timing=timing, work={'images': images})


def build_loader(config: Mapping[str, Any], batch: int, workers: int):
    """The config's data loader, as a Runner builds it.

    Raises:
        OptionError: If the data is not there.
    """
    config = copy.deepcopy(config)
    config.update(batch_size=batch, num_workers=workers)
    if not workers:  # torch refuses these without workers
        config.update(persistent_workers=False)
        config.pop('prefetch_factor', None)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # pycocotools prints
            return Runner.build_dataloader(config, seed=0)
    except FileNotFoundError as error:
        raise OptionError(f'the data cannot be read: {error}') from error


def time_batches(loader, count: int) -> tuple[float, Timing]:
    """Milliseconds to the first batch, and between the batches after the warm-up.

    A data set that is too short is run through again.
    """
    start = time.perf_counter()
    iterator = iter(loader)
    next(iterator)
    first_ms = (time.perf_counter() - start) * 1e3
    samples: list[float] = []
    for turn in range(1, WARM_UP_BATCHES + count):
        before = time.perf_counter()
        if next(iterator, None) is None:
            iterator = iter(loader)
            next(iterator)
        if turn >= WARM_UP_BATCHES:
            samples.append((time.perf_counter() - before) * 1e3)
    return first_ms, Timing(tuple(samples))


def innermost(dataset) -> BaseDataset:
    """The data set below all wrappers, whose pipeline reads the images."""
    while True:
        if hasattr(dataset, 'dataset'):
            dataset = dataset.dataset
        elif hasattr(dataset, 'datasets'):
            dataset = dataset.datasets[0]
        else:
            return dataset


def time_transforms(dataset: BaseDataset, count: int) -> list[tuple[str, Timing]]:
    """Milliseconds an image of each transform, in this process; the first is warm-up.

    An image that a transform drops counts up to that transform.
    """
    dataset.full_init()
    transforms = dataset.pipeline.transforms
    names = [READ_INFO, *(type(transform).__name__ for transform in transforms)]
    samples: list[list[float]] = [[] for _ in names]
    steps = [dataset.get_data_info, *transforms]
    for image in range(count + 1):
        results: Any = image % len(dataset)
        for step, taken in zip(steps, samples, strict=True):
            before = time.perf_counter()
            results = step(results)
            if image > 0:
                taken.append((time.perf_counter() - before) * 1e3)
            if results is None:
                break
    found = zip(names, samples, strict=True)
    return [(name, Timing(tuple(taken))) for name, taken in found if taken]


# Tables and picture


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
    figures.label_rows(axes, labels)
    axes.grid(axis='x', alpha=0.3)
