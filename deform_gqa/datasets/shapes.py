"""A synthetic instance dataset: textured, overlapping shapes in COCO format.

With it, a detector can be trained and tested without a download. Every image is a pure
function of (seed, split, index): it does not depend on how many other images are made,
nor on the number of worker processes. With the same versions of NumPy and OpenCV on
the same kind of processor, the files are equal byte for byte.

Only the outline tells the class: colour, texture, size, aspect ratio and rotation are
drawn from the same distributions for all classes.

Later shapes cover earlier ones, and shapes may reach over the border of the image.
Masks, boxes and areas describe the visible part. If less than ``min_visible`` of a
shape's area would be visible, or it would cover an earlier shape that far, other
positions are tried; if none of them will do, the shape is not drawn at all. So nothing
is in a picture that has no annotation.

Layout of a dataset::

    OUT/shapes.json                         the parameters; written last
    OUT/annotations/{train,val,test}.json   COCO, ids counted from 1
    OUT/images/{train,val,test}/000000.jpg  JPEG, quality 92
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deform_gqa.checks import check_int

from .coco import coco_categories, mask_to_polygons, write_json
from .shapes_config import CLASSES, SPLITS, ShapesConfig
from .shapes_drawing import Sample, make_sample

METADATA_FILE = 'shapes.json'
JPEG_QUALITY = 92
_OWN_FILES = re.compile(
    rf'{re.escape(METADATA_FILE)}'
    rf'|annotations/({"|".join(SPLITS)})\.json'
    rf'|images/({"|".join(SPLITS)})/\d{{6,}}\.jpg'
)


def sample_annotations(sample: Sample) -> list[dict[str, Any]]:
    """COCO records of the visible parts, without ``id`` and ``image_id``.

    ``bbox`` is [x, y, width, height] in pixels, ``area`` the number of visible pixels;
    the polygons of ``segmentation`` follow pixel edges: rasterised, they are the mask.
    """
    records = []
    for index, label in enumerate(sample.labels):
        mask = (sample.id_map == index + 1).astype(np.uint8)
        x, y, width, height = cv2.boundingRect(mask)
        crop = mask[y : y + height, x : x + width]
        records.append(
            {
                'category_id': label + 1,
                'bbox': [x, y, width, height],
                'area': int(np.count_nonzero(crop)),
                'iscrowd': 0,
                'segmentation': mask_to_polygons(crop, (x, y)),
            }
        )
    return records


def generate_dataset(
    config: ShapesConfig,
    out_dir: Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    on_image: Callable[[], None] | None = None,
) -> bool:
    """Write a dataset unless it is there already.

    Everything is written to a folder beside ``out_dir`` that replaces it when it is
    complete, so ``out_dir`` never holds half a dataset.

    Args:
        config: what to generate.
        out_dir: where to write it; missing parents are made.
        workers: processes, >= 1; the output does not depend on it.
        overwrite: replace a dataset of other parameters. A folder that is not a dataset
            of this generator, or holds other files as well, is never replaced.
        on_image: called after each image, for a progress bar.

    Returns:
        True if the dataset was written; False if a complete one with the same
        parameters was there, which is left as it is.

    Raises:
        FileExistsError: if ``out_dir`` holds something else.
        TypeError: if ``workers`` is not an integer.
        ValueError: if ``workers`` is less than 1.
        OSError: if the folder cannot be written.
    """
    check_int('workers', workers, 1)
    out_dir = Path(out_dir).resolve()
    if _is_complete(config, out_dir, overwrite):
        return False
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with _replaced_when_done(out_dir) as folder:
        (folder / 'annotations').mkdir()
        for split in SPLITS:
            (folder / 'images' / split).mkdir(parents=True)
            records = _write_images(config, split, folder, workers, on_image)
            write_json(
                folder / 'annotations' / f'{split}.json',
                _coco_document(config, split, records),
            )
        write_json(folder / METADATA_FILE, config.metadata())
    return True


def _write_image(
    config: ShapesConfig, split: str, folder: Path, index: int
) -> list[dict[str, Any]]:
    """Write one image; returns its annotations."""
    sample = make_sample(config, split, index)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    done, data = cv2.imencode('.jpg', sample.image, options)
    if not done:
        raise OSError(f'OpenCV cannot encode image {index} of {split} as JPEG')
    (folder / 'images' / split / _file_name(index)).write_bytes(data.tobytes())
    return sample_annotations(sample)


def _file_name(index: int) -> str:
    return f'{index:06d}.jpg'


def _write_images(
    config: ShapesConfig,
    split: str,
    folder: Path,
    workers: int,
    on_image: Callable[[], None] | None,
) -> list[list[dict[str, Any]]]:
    """Write the images of a split; returns the annotations of each."""
    write = partial(_write_image, config, split, folder)
    records = []
    for record in _map(write, config.num_images(split), workers):
        records.append(record)
        if on_image is not None:
            on_image()
    return records


def _map(function: Callable[[int], Any], count: int, workers: int) -> Iterator[Any]:
    """``map(function, range(count))``, in order, spread over processes."""
    if min(workers, count) <= 1:
        yield from map(function, range(count))
        return
    # Forking a process that runs OpenCV's or torch's threads can deadlock.
    pool = ProcessPoolExecutor(min(workers, count), get_context('spawn'))
    try:
        yield from pool.map(function, range(count), chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)


def _coco_document(
    config: ShapesConfig, split: str, records: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """A COCO document from the annotations of each image, in order."""
    width, height = config.image_size
    images, annotations = [], []
    for index, image_records in enumerate(records):
        images.append(
            {
                'id': index + 1,
                'file_name': _file_name(index),
                'width': width,
                'height': height,
            }
        )
        for record in image_records:
            # pycocotools takes the annotation id 0 for "no match": start with 1.
            ids = {'id': len(annotations) + 1, 'image_id': index + 1}
            annotations.append({**record, **ids})
    return {
        'info': {'description': f'synthetic shapes, {split}', **config.metadata()},
        'categories': coco_categories(CLASSES),
        'images': images,
        'annotations': annotations,
    }


def _is_complete(config: ShapesConfig, out_dir: Path, overwrite: bool) -> bool:
    """Whether ``out_dir`` is the dataset wanted; raises if it must not be replaced."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    metadata = _read_metadata(out_dir)
    if metadata is None:
        raise FileExistsError(
            f'{out_dir} exists and is not a shapes dataset; give another folder'
        )
    if metadata == config.metadata():
        missing = _missing_file(config, out_dir)
        if missing is None:
            return True
        reason = f'holds this dataset, but {missing} is missing'
    else:
        reason = f'holds a dataset of other parameters ({_changes(metadata, config)})'
    if not overwrite:
        raise FileExistsError(
            f'{out_dir} {reason}; overwrite it (--overwrite) or give another folder'
        )
    foreign = _foreign_file(out_dir)
    if foreign is not None:
        raise FileExistsError(
            f'{out_dir} is not overwritten: {foreign} is not of a shapes dataset; move '
            'it away or give another folder'
        )
    return False


def _read_metadata(out_dir: Path) -> dict[str, Any] | None:
    """The parameters recorded in a dataset; None if the folder is not one."""
    path = out_dir / METADATA_FILE
    if not path.is_file():
        return None
    try:
        metadata = json.loads(path.read_text(encoding='utf-8'))
    except ValueError:
        return None
    if isinstance(metadata, dict) and metadata.get('generator') == __name__:
        return metadata
    return None


def _foreign_file(out_dir: Path) -> Path | None:
    """The first file in the folder that this generator does not write."""
    for path in sorted(out_dir.rglob('*')):
        is_folder = path.is_dir() and not path.is_symlink()
        name = path.relative_to(out_dir).as_posix()
        if not is_folder and not _OWN_FILES.fullmatch(name):
            return path
    return None


def _missing_file(config: ShapesConfig, out_dir: Path) -> Path | None:
    """The first file that a complete dataset has and this folder lacks."""
    for split in SPLITS:
        annotations = out_dir / 'annotations' / f'{split}.json'
        if not annotations.is_file():
            return annotations
        folder = out_dir / 'images' / split
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        for index in range(config.num_images(split)):
            if _file_name(index) not in present:
                return folder / _file_name(index)
    return None


def _changes(metadata: dict[str, Any], config: ShapesConfig) -> str:
    """Which parameters differ, as in ``seed 0, wanted 1``."""
    return ', '.join(
        f'{name} {metadata.get(name)}, wanted {value}'
        for name, value in config.metadata().items()
        if metadata.get(name) != value
    )


@contextmanager
def _replaced_when_done(out_dir: Path) -> Iterator[Path]:
    """A new folder beside ``out_dir`` that replaces it if the block raises nothing."""
    folder = out_dir.with_name(f'.{out_dir.name}.tmp-{os.getpid()}')
    old = out_dir.with_name(f'.{out_dir.name}.old-{os.getpid()}')
    if folder.exists():  # left by a killed process that had the same id
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
        if out_dir.exists():
            out_dir.rename(old)
        folder.rename(out_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not out_dir.exists():
            old.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)
