"""``benchmark.py dataloader``: batches a second, and the time of each transform."""

import argparse
import contextlib
import copy
import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.runner import Runner

from deform_gqa.profiling.environment import describe_environment
from deform_gqa.profiling.timing import Timing

from ..core.cases import BATCH, TRANSFORM
from ..core.errors import OptionError
from ..core.options import (
    add_output_arguments,
    check_options,
    check_out,
    one_of,
    resolve_threads,
    use_threads,
)
from ..core.progress import progress
from ..core.report import Report, Row
from ..core.writer import publish
from ..models.build import load_config
from ..models.options import add_cfg_options, parse_cfg_options
from ..models.report import mm_versions
from .report import dataloader_figure, dataloader_markdown

DESCRIPTION = 'Data time: batches of a config, and its transforms one by one.'
SPLITS = ('train', 'val', 'test')
BATCHES, QUICK_BATCHES = 50, 10
IMAGES, QUICK_IMAGES = 100, 20
WARM_UP_BATCHES = 2
READ_INFO = 'get_data_info'
LOADER = 'loader'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('config', metavar='CONFIG', help="a path, or 'mmdet::DIR/NAME.py'")
    add('--split', default='train', help=f'of {", ".join(SPLITS)} (default: train)')
    add('--workers', nargs='+', type=int, metavar='N', help="default: the config's")
    add('--batch-sizes', nargs='+', type=int, metavar='N', help="default: the config's")
    add(
        '--batches',
        type=int,
        help=f'timed, after {WARM_UP_BATCHES} (default: {BATCHES}, {QUICK_BATCHES} if '
        'quick)',
    )
    add(
        '--images',
        type=int,
        help=f'that transforms are timed with (default: {IMAGES}, {QUICK_IMAGES} if '
        'quick)',
    )
    add_cfg_options(parser)
    add_output_arguments(parser, quick='few batches')


@dataclasses.dataclass(frozen=True)
class LoaderCase:
    """One setting of the data loader."""

    split: str
    batch: int
    workers: int

    @property
    def name(self) -> str:
        return f'dataloader/{self.split}/b{self.batch}/w{self.workers}'


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print the tables, and write the files if --out is given.

    Raises:
        OptionError: For wrong options, or data that is not there.
    """
    threads = resolve_threads(args)
    check_out(args.out)
    one_of('--split', [args.split], SPLITS)
    check_options(args, 'batch_sizes', 'batches', 'images')
    for workers in args.workers or ():
        if workers < 0:
            raise OptionError(f'--workers must be 0 or more, got {workers}')
    cfg = load_config(args.config, parse_cfg_options(args.cfg_options))
    loader_config = cfg.get(f'{args.split}_dataloader')
    if loader_config is None:
        raise OptionError(f'config {args.config!r} has no {args.split}_dataloader')
    use_threads(threads)
    cases = loader_cases(args, loader_config)
    batches = args.batches or (QUICK_BATCHES if args.quick else BATCHES)
    images = args.images or (QUICK_IMAGES if args.quick else IMAGES)
    rows, described = measure(cfg, loader_config, cases, batches, images)
    environment = describe_environment(torch.device('cpu'))
    report = Report(
        suite='dataloader',
        command=command,
        environment={**environment, **mm_versions()},
        options={
            'config': args.config,
            'split': args.split,
            'dtype': f'{args.split} data of {args.config.rsplit("/", 1)[-1]}',
        },
        cases=described,
        rows=rows,
    )
    pictures = {'dataloader': functools.partial(dataloader_figure, report)}
    markdown = dataloader_markdown(report)
    publish('dataloader', report.to_json(), markdown, args.out, pictures)


def loader_cases(
    args: argparse.Namespace, config: Mapping[str, Any]
) -> list[LoaderCase]:
    """Every batch size with every number of workers."""
    batch_sizes = args.batch_sizes or [config.get('batch_size', 1)]
    workers = args.workers or [config.get('num_workers', 0)]
    return [
        LoaderCase(args.split, batch, count)
        for batch in dict.fromkeys(batch_sizes)
        for count in dict.fromkeys(workers)
    ]


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


def measure(
    cfg: Config,
    config: Mapping[str, Any],
    cases: Sequence[LoaderCase],
    batches: int,
    images: int,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of all cases and of all transforms, and what the report says of each."""
    set_multi_processing(cfg)
    rows: list[Row] = []
    described: list[dict[str, Any]] = []
    with progress(len(cases) + 1) as step:
        for case in cases:
            step(case.name)
            loader = build_loader(config, case.batch, case.workers)
            first_ms, timing = time_batches(loader, batches)
            rows.append(_row(case.name, BATCH, timing, case.batch))
            described.append(
                {
                    'name': case.name,
                    **dataclasses.asdict(case),
                    'first_batch_ms': first_ms,
                    'dataset_images': len(loader.dataset),
                }
            )
            del loader
        step('transforms')
        dataset = innermost(build_loader(config, 1, 0).dataset)
        for number, (name, timing) in enumerate(time_transforms(dataset, images)):
            case_name = f'transform/{number:02d}-{name}'
            rows.append(_row(case_name, TRANSFORM, timing, 1))
            described.append({'name': case_name, 'transform': name})
    return rows, described


def set_multi_processing(cfg: Config) -> None:
    """What a Runner does with env_cfg.mp_cfg: start method, OpenCV's threads."""
    from mmengine.utils.dl_utils import set_multi_processing as set_up

    set_up(**cfg.get('env_cfg', {}).get('mp_cfg', {}))


def _row(case: str, direction: str, timing: Timing, images: int) -> Row:
    return Row(case, LOADER, direction, timing=timing, work={'images': images})


def time_batches(loader, count: int) -> tuple[float, Timing]:
    """Milliseconds to the first batch, and between the batches after the warm-up.

    A data set that is too short is run through again.
    """
    start = time.perf_counter()
    iterator = iter(loader)
    next(iterator)
    first_ms = (time.perf_counter() - start) * 1e3
    samples: list[float] = []
    for number in range(1, WARM_UP_BATCHES + count):
        before = time.perf_counter()
        if next(iterator, None) is None:
            iterator = iter(loader)
            next(iterator)
        if number >= WARM_UP_BATCHES:
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
    for number in range(count + 1):
        steps = [functools.partial(_info, dataset, number % len(dataset)), *transforms]
        results: Any = None
        for index, step in enumerate(steps):
            before = time.perf_counter()
            results = step() if index == 0 else step(results)
            if number > 0:
                samples[index].append((time.perf_counter() - before) * 1e3)
            if results is None:
                break
    return [
        (name, Timing(tuple(taken)))
        for name, taken in zip(names, samples, strict=True)
        if taken
    ]


def _info(dataset: BaseDataset, index: int) -> dict[str, Any]:
    return dataset.get_data_info(index)
