"""Images and annotations for a detector, random or read from files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData

from ..core.errors import OptionError
from .build import dicts_of

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
# Sides of synthetic objects, as shares of the image's.
_OBJECT_SIDES = (0.05, 0.4)
# Where no transform of the pipeline says a size.
DEFAULT_SIZE = (800, 1333)


def config_size(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the test pipeline's images: its last fixed scale."""
    size = DEFAULT_SIZE
    for transform in test_pipeline(cfg):
        if 'Resize' in transform['type'] and 'scale' in transform:
            short, long = sorted(transform['scale'])
            size = (short, long)  # landscape, as most photos
    return size


def test_pipeline(cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Transforms of the test data, below any wrapper of the data set."""
    dataset = cfg.get('test_dataloader', {}).get('dataset', {})
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return list(dataset.get('pipeline', []))


def count_classes(model_config: Mapping[str, Any]) -> int:
    """Classes that every head of the model knows.

    Raises:
        OptionError: If no part of the model says it.
    """
    counts = [
        part['num_classes'] for part in dicts_of(model_config) if 'num_classes' in part
    ]
    if not counts:
        raise OptionError('the model config holds no num_classes: no ground truth')
    return min(counts)


def random_batch(
    size: tuple[int, int], batch: int, objects: int, classes: int, with_masks: bool
) -> dict[str, list]:
    """Noise images with random boxes, as a data loader hands them over.

    Args:
        size: (height, width).
        batch: Number of images.
        objects: Boxes in each image.
        classes: Labels are drawn from this many.
        with_masks: Add a mask that fills each box.
    """
    generator = np.random.default_rng(0)
    samples = []
    for index in range(batch):
        image = torch.from_numpy(generator.integers(0, 256, (3, *size), dtype=np.uint8))
        metainfo = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), size)
        metainfo |= dict(img_id=index, img_path='', scale_factor=(1.0, 1.0))
        metainfo |= dict(flip=False, flip_direction=None)
        sample = DetDataSample(metainfo=metainfo)
        sample.gt_instances = _instances(generator, size, objects, classes, with_masks)
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
        samples.append(dict(inputs=image, data_samples=sample))
    return pseudo_collate(samples)


def _instances(
    generator: np.random.Generator,
    size: tuple[int, int],
    objects: int,
    classes: int,
    with_masks: bool,
) -> InstanceData:
    sides = np.array(size[::-1])  # width, height
    extent = generator.uniform(*_OBJECT_SIDES, (objects, 2)) * sides
    corner = generator.uniform(0, 1, (objects, 2)) * (sides - extent)
    boxes = np.concatenate((corner, corner + extent), axis=1).astype(np.float32)
    instances = InstanceData(
        bboxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(generator.integers(0, classes, objects)),
    )
    if with_masks:
        masks = np.zeros((objects, *size), dtype=np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            rows = slice(math.floor(top), math.ceil(bottom))
            mask[rows, math.floor(left) : math.ceil(right)] = 1
        instances.masks = BitmapMasks(masks, *size)
    return instances


def find_images(paths: Sequence[str]) -> list[str]:
    """Image files, and those in folders.

    Raises:
        OptionError: For a path that does not exist, or if there is no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            files += sorted(found)
        elif path.is_file():
            files.append(path)
        else:
            raise OptionError(f'--images {str(path)!r} does not exist')
    if not files:
        raise OptionError(f'--images {" ".join(paths)}: no image found')
    return [str(path) for path in files]


def image_batch(cfg: Mapping[str, Any], paths: Sequence[str], batch: int) -> dict:
    """Images through the test pipeline; repeated where there are too few."""
    transforms = [
        transform
        for transform in test_pipeline(cfg)
        if 'LoadAnnotations' not in transform['type']
    ]
    pipeline = Compose(transforms)
    chosen = [paths[index % len(paths)] for index in range(batch)]
    return pseudo_collate(
        [pipeline(dict(img_path=p, img_id=i)) for i, p in enumerate(chosen)]
    )
