"""``benchmark.py detector``: any detector of MMDetection by its config."""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config

from ..core.cases import PREDICT, PREPROCESS, TRAIN, Case, Workload
from ..core.errors import OptionError
from ..core.fields import size_text
from ..core.kv_heads import Heads
from ..core.options import parse_count
from . import build, detector_inputs
from .options import ModelOptions, add_model_arguments, resolve_model
from .report import model_case, run_suite
from .workload import evaluation, flat_output, in_mode, training_step

DESCRIPTION = 'Latency, memory, FLOPs and parameters of detectors, data time apart.'
DIRECTIONS = (PREPROCESS, PREDICT, TRAIN)
QUICK_SIZES = ((192, 256),)
OBJECTS = 8
NOTES = (
    '`preprocess` is the data preprocessor (copy to the device, normalise, pad); '
    '`predict` is the network with its post-processing; `train` is the losses and '
    'backward to all parameters, without the optimiser. Reading and decoding images is '
    'not part of any: see `benchmark.py dataloader`.'
)
RANDOM_NOTE = 'With untrained weights post-processing has few detections, or very many.'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        'configs',
        nargs='+',
        metavar='CONFIG',
        help="a path, or 'mmdet::DIR/NAME.py' for a stock one",
    )
    add('--images', nargs='+', metavar='PATH', help='files or folders (default: noise)')
    add(
        '--objects',
        type=parse_count,
        default=OBJECTS,
        help=f'boxes an image in training (default: {OBJECTS})',
    )
    add_model_arguments(parser, DIRECTIONS, quick='192x256')


def run(args: argparse.Namespace, command: str) -> None:
    if args.images and args.sizes:
        raise OptionError('--sizes is for noise; images have the size of the pipeline')
    if args.images and args.directions and TRAIN in args.directions:
        raise OptionError('--directions train needs noise images with ground truth')
    options = resolve_model(args, DIRECTIONS, QUICK_SIZES if args.quick else ())
    images = detector_inputs.find_images(args.images) if args.images else []
    if images and not args.directions:
        options = dataclasses.replace(options, directions=(PREPROCESS, PREDICT))
    cases = [
        case
        for config in args.configs
        for case in detector_cases(config, options, images, args.objects)
    ]
    notes = NOTES if args.checkpoint else f'{NOTES} {RANDOM_NOTE}'
    run_suite('detector', 'Detectors', command, options, cases, notes)


@dataclasses.dataclass(frozen=True)
class BatchSource:
    """Where the batches of a case come from.

    Attributes:
        size: (height, width) of noise images; None for images from files.
        images: The files.
        objects: Boxes in each noise image.
    """

    cfg: Config
    size: tuple[int, int] | None
    batch: int
    images: tuple[str, ...]
    objects: int

    def describe(self) -> str:
        if self.size is not None:
            return size_text(self.size)
        shapes = [tuple(image.shape[1:]) for image in self.make()['inputs']]
        height, width = (max(sides) for sides in zip(*shapes, strict=True))
        return f'{len(set(self.images))} files, up to {height}x{width}'

    def make(self) -> dict[str, list]:
        """A batch as the data loader hands it over; noise has ground truth."""
        if self.size is None:
            return detector_inputs.image_batch(self.cfg, self.images, self.batch)
        model = self.cfg.model
        return detector_inputs.random_batch(
            self.size,
            self.batch,
            self.objects,
            detector_inputs.count_classes(model),
            with_masks=any('mask_head' in part for part in build.dicts_of(model)),
        )


def detector_cases(
    target: str, options: ModelOptions, images: Sequence[str], objects: int
) -> list[Case]:
    """One config at every number of kv heads, image size and batch size.

    Raises:
        OptionError: For a config without a model.
    """
    cfg = build.load_config(target, options.cfg_options)
    if 'model' not in cfg:
        raise OptionError(f'config {target!r} has no model')
    sizes: Sequence[Any] = options.sizes or (detector_inputs.config_size(cfg),)
    configs = build.along_kv_heads(cfg.model.to_dict(), options.kv_heads)

    def make(config: dict[str, Any], heads: Heads | None, size: Any, batch: int):
        source = BatchSource(cfg, size, batch, tuple(images), objects)
        fields = {
            'detector': build.short_name(target),
            'kv heads': str(heads or ''),
            'image': source.describe(),
        }
        make = functools.partial(build_workload, config, source, options)
        return model_case(fields, heads, batch, options, make)

    return build.model_cases(configs, [None] if images else sizes, options, make)


def build_workload(
    config: dict[str, Any], source: BatchSource, options: ModelOptions, backend: str
) -> Workload:
    """The detector with its batches on the device; noise alone has ground truth."""
    model, used = build.with_backend(config, options, backend)
    where = model, options.device, options.amp_dtype
    preprocess = model.data_preprocessor
    batch = source.make()
    data = preprocess(batch, training=False)
    calls = {
        PREPROCESS: in_mode(model, False, lambda: preprocess(batch, training=False)),
        PREDICT: evaluation(lambda: model(**data, mode='predict'), *where),
    }
    if source.size is not None:
        train_data = preprocess(batch, training=True)
        calls[TRAIN] = training_step(
            lambda: model.parse_losses(model(**train_data, mode='loss'))[0], *where
        )
    maps = evaluation(lambda: model.extract_feat(data['inputs']), *where)
    output = functools.partial(flat_output, maps)  # of backbone and neck
    return Workload(used, calls, output=output, model=model)
