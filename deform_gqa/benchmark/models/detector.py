"""``benchmark.py detector``: any detector of MMDetection by its config."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.config import Config

from ..core.cases import PREDICT, PREPROCESS, TRAIN, Case, Workload
from ..core.errors import OptionError
from ..core.fields import size_text
from ..core.options import check_options
from . import build, detector_inputs
from .options import ModelOptions, add_model_arguments, resolve_model
from .report import Built, model_case, run_suite
from .workload import autocast, flat_output, in_mode

DESCRIPTION = 'Latency, memory, FLOPs and parameters of detectors, data time apart.'
DIRECTIONS = (PREPROCESS, PREDICT, TRAIN)
QUICK_SIZES = ('192x256',)
OBJECTS = 8
NOTES = (
    'Medians over the samples; memory is the peak during a call over the use before '
    'it. `preprocess` is the data preprocessor (copy to the device, normalise, pad); '
    '`predict` is the network with its post-processing; `train` is the losses and '
    'backward to all parameters, without the optimiser. Reading and decoding images is '
    'not part of any: see `benchmark.py dataloader`. FLOPs are two for each '
    'multiply-add of convolutions, linear layers and attention products.'
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
        type=int,
        default=OBJECTS,
        help=f'boxes an image in training (default: {OBJECTS})',
    )
    add_model_arguments(parser, DIRECTIONS, quick='192x256')


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print the table, and write the files if --out is given.

    Raises:
        OptionError: For wrong options, before anything is measured.
    """
    check_options(args, 'objects')
    if args.images and args.sizes:
        raise OptionError('--sizes is for noise; images have the size of the pipeline')
    if args.images and args.directions and TRAIN in args.directions:
        raise OptionError('--directions train needs noise images with ground truth')
    options = resolve_model(args, DIRECTIONS, QUICK_SIZES if args.quick else (), (1,))
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
    cfg = load_detector(target, options)
    name = build.short_name(target)
    sizes = options.sizes or (detector_inputs.config_size(cfg),)
    cases = []
    config = cfg.model.to_dict()
    for choice in build.kv_choices(config, options.kv_heads):
        model = build.with_kv_heads(config, choice)
        for size in [None] if images else sizes:
            for batch in options.batch_sizes:
                source = BatchSource(cfg, size, batch, tuple(images), objects)
                cases.append(detector_case(name, model, source, options))
    return cases


def load_detector(target: str, options: ModelOptions) -> Config:
    """The config; OptionError for one without a model."""
    cfg = build.load_config(target, options.cfg_options)
    if 'model' not in cfg:
        raise OptionError(f'config {target!r} has no model')
    return cfg


def detector_case(
    name: str, config: dict[str, Any], source: BatchSource, options: ModelOptions
) -> Case:
    kv_heads = build.kv_heads_text(config)
    fields = {'detector': name, 'kv heads': kv_heads, 'image': source.describe()}
    parts = ['detector', *filter(None, fields.values()), f'b{source.batch}']
    return model_case(
        '/'.join(parts), fields, source.batch, options, build_workload, config, source
    )


def build_workload(
    config: dict[str, Any], source: BatchSource, options: ModelOptions, backend: str
) -> Built:
    """The detector with its batches on the device."""
    device, amp = options.device, options.amp_dtype
    model, used = build.with_backend(config, options, backend)
    batch = source.make()

    def preprocess() -> Any:
        return model.data_preprocessor(batch, training=False)

    calls = {PREPROCESS: in_mode(model, False, preprocess)}
    data = preprocess()
    if PREDICT in options.directions:
        calls[PREDICT] = predict_call(model, data, device, amp)
    if TRAIN in options.directions:
        calls[TRAIN] = train_call(model, batch, device, amp)
    workload = Workload(used, calls, model=model)
    return workload, lambda: features(model, data, device, amp)


def predict_call(model, data: dict, device, amp) -> Callable[[], Any]:
    """Network and post-processing of a preprocessed batch."""

    @torch.no_grad()
    def predict() -> Any:
        with autocast(device, amp):
            return model(**data, mode='predict')

    return in_mode(model, False, predict)


def train_call(model, batch: dict, device, amp) -> Callable[[], Any]:
    """Losses and backward; leaves no gradient behind."""
    data = model.data_preprocessor(batch, training=True)

    def train() -> Any:
        with autocast(device, amp):
            losses = model(**data, mode='loss')
        loss, _ = model.parse_losses(losses)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss

    return in_mode(model, True, train)


@torch.no_grad()
def features(model, data: dict, device, amp) -> torch.Tensor:
    """Maps of backbone and neck: what backends are compared by."""
    model.eval()
    with autocast(device, amp):
        return flat_output(lambda: model.extract_feat(data['inputs']))
