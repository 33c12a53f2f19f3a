"""A synthetic instance dataset: textured, overlapping shapes in COCO format.

It lets a detector be trained and tested without a download. Every image is a pure
function of (seed, split, index): it does not depend on how many other images are made,
nor on the number of worker processes. With the same versions of NumPy and OpenCV on
the same kind of processor the files are equal byte for byte.

The class shows in the outline alone: colour, texture, size, aspect ratio and rotation
are drawn from the same distributions for all classes.

Later shapes cover earlier ones, and shapes may reach over the border of the image.
Masks, boxes and areas describe the visible part. A shape that would be visible to less
than ``min_visible`` of its area, or would cover an earlier one that far, is tried at
other places and, if none will do, left out of the picture as well: nothing is drawn
that has no annotation.

Layout of a dataset::

    OUT/shapes.json                    the parameters; written last
    OUT/annotations/{train,val}.json   COCO, ids counted from 1
    OUT/images/{train,val}/000000.jpg  JPEG, quality 92
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from deform_gqa.datasets.coco import coco_categories, mask_to_polygons, write_json

CLASSES = ('circle', 'square', 'triangle', 'star', 'cross', 'crescent')
SPLITS = ('train', 'val')
METADATA_FILE = 'shapes.json'

# Raise it with every change that alters a byte of the output.
GENERATOR_VERSION = 2

# Square root of a shape's whole area, in pixels, and how often a range is drawn. The
# bounds lie a little inside those of COCO (32 and 96), as occlusion takes area away.
SIZE_RANGES = ((16.0, 31.0, 0.4), (34.0, 94.0, 0.38), (102.0, math.inf, 0.22))
MAX_SIZE_SHARE = 0.66  # of the shorter image side
MIN_IMAGE_SIZE = 32
MAX_ASPECT_RATIO = 1.5
PLACEMENT_TRIES = 16
JPEG_QUALITY = 92
_SUBPIXEL_BITS = 4


@dataclass(frozen=True)
class ShapesConfig:
    """Parameters of a dataset; checked when made.

    Args:
        num_train: images of the split ``train``, >= 0.
        num_val: images of the split ``val``, >= 0; one of the two must be positive.
        image_size: (width, height) in pixels, each >= 32.
        seed: >= 0.
        min_objects: fewest shapes an image is planned with, >= 0.
        max_objects: most shapes in an image, >= 1 and >= ``min_objects``.
        min_visible: smallest visible share of a shape's area, in (0, 1].

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if a value is out of range.
    """

    num_train: int = 1000
    num_val: int = 80
    image_size: tuple[int, int] = (192, 192)
    seed: int = 0
    min_objects: int = 1
    max_objects: int = 8
    min_visible: float = 0.5

    def __post_init__(self) -> None:
        for name in ('num_train', 'num_val', 'seed', 'min_objects'):
            _check_int(name, getattr(self, name), 0)
        _check_int('max_objects', self.max_objects, 1)
        if self.num_train == 0 and self.num_val == 0:
            raise ValueError('num_train and num_val are both 0, nothing to generate')
        if self.max_objects < self.min_objects:
            raise ValueError(
                f'max_objects must be at least min_objects ({self.min_objects}), '
                f'got {self.max_objects}'
            )
        if not isinstance(self.image_size, tuple | list) or len(self.image_size) != 2:
            raise TypeError(
                f'image_size must be (width, height), got {self.image_size!r}'
            )
        for side in self.image_size:
            _check_int('image_size', side, MIN_IMAGE_SIZE)
        if isinstance(self.min_visible, bool) or not isinstance(self.min_visible, Real):
            raise TypeError(f'min_visible must be a number, got {self.min_visible!r}')
        if not 0 < self.min_visible <= 1:
            raise ValueError(f'min_visible must be in (0, 1], got {self.min_visible}')
        self._use_plain_numbers()

    def _use_plain_numbers(self) -> None:
        """Turn NumPy's numbers into Python's, which JSON can hold."""
        for name in ('num_train', 'num_val', 'seed', 'min_objects', 'max_objects'):
            object.__setattr__(self, name, int(getattr(self, name)))
        width, height = self.image_size
        object.__setattr__(self, 'image_size', (int(width), int(height)))
        object.__setattr__(self, 'min_visible', float(self.min_visible))

    def num_images(self, split: str) -> int:
        """Number of images of a split."""
        return {'train': self.num_train, 'val': self.num_val}[split]

    def metadata(self) -> dict[str, Any]:
        """All that decides the output, as it is recorded in ``shapes.json``."""
        return {
            'generator': __name__,
            'version': GENERATOR_VERSION,
            'classes': list(CLASSES),
            **asdict(self),
            'image_size': list(self.image_size),
        }


class Sample(NamedTuple):
    """One generated image.

    Attributes:
        image: (H, W, 3) uint8, BGR.
        id_map: (H, W) int32; 0 is background, i + 1 the visible part of shape i.
        labels: index into ``CLASSES`` of each shape, in drawing order.
        areas: whole area of each shape in pixels, hidden parts included.
    """

    image: np.ndarray
    id_map: np.ndarray
    labels: list[int]
    areas: list[int]


class _Shape(NamedTuple):
    """Mask (h, w) bool of a whole shape and its left upper corner (x, y)."""

    mask: np.ndarray
    corner: tuple[int, int]

    def crop(self, width: int, height: int) -> tuple[np.ndarray, tuple[slice, slice]]:
        """The part of the mask inside the image, and where in the image it lies."""
        (left, top), (rows, columns) = self.corner, self.mask.shape
        x0, x1 = max(left, 0), max(min(left + columns, width), 0)
        y0, y1 = max(top, 0), max(min(top + rows, height), 0)
        mask = self.mask[y0 - top : y1 - top, x0 - left : x1 - left]
        return mask, (slice(y0, y1), slice(x0, x1))


def make_sample(config: ShapesConfig, split: str, index: int) -> Sample:
    """Draw image ``index`` of ``split``; the counts of ``config`` are not looked at.

    Raises:
        TypeError: if ``index`` is not an integer.
        ValueError: if ``split`` is unknown or ``index`` negative.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {SPLITS}, got {split!r}')
    _check_int('index', index, 0)
    sequence = np.random.SeedSequence(
        config.seed, spawn_key=(SPLITS.index(split), index)
    )
    rng = np.random.default_rng(sequence)
    width, height = config.image_size

    colours = [rng.uniform(40, 215, 3)]
    canvas = render_background(rng, width, height, colours[0])
    id_map = np.zeros((height, width), np.int32)
    labels: list[int] = []
    areas: list[int] = []
    for size in _draw_sizes(rng, config):
        label = int(rng.integers(len(CLASSES)))
        polygon = _draw_polygon(rng, CLASSES[label], size)
        shape = _place(rng, polygon, id_map, areas, config.min_visible)
        if shape is None:
            continue
        labels.append(label)
        areas.append(int(np.count_nonzero(shape.mask)))
        mask, window = shape.crop(width, height)
        id_map[window][mask] = len(labels)
        colours.append(_draw_colour(rng, colours))
        _paint(rng, canvas[window], mask, colours[-1])
    return Sample(_finish(rng, canvas), id_map, labels, areas)


def shape_polygon(name: str) -> np.ndarray:
    """Outline of a class: (P, 2) float64 (x, y), area 1, bounding box around (0, 0).

    Raises:
        ValueError: if ``name`` is not in ``CLASSES``.
    """
    if name not in CLASSES:
        raise ValueError(f'name must be one of {CLASSES}, got {name!r}')
    if name == 'circle':
        points = _on_circle(np.linspace(0, 2 * np.pi, 48, endpoint=False))
    elif name == 'square':
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    elif name == 'triangle':
        points = _on_circle(np.arange(3) * (2 * np.pi / 3))
    elif name == 'star':
        radii = np.where(np.arange(10) % 2, 0.42, 1.0)
        points = _on_circle(np.arange(10) * (np.pi / 5)) * radii[:, None]
    elif name == 'cross':
        quarter = np.array([(0.3, -1), (0.3, -0.3), (1, -0.3)])
        turn = np.array([(0, 1), (-1, 0)])  # row vectors, by 90 degrees
        points = np.concatenate(
            [quarter @ np.linalg.matrix_power(turn, i) for i in range(4)]
        )
    else:
        points = _crescent()
    points = points - (points.max(axis=0) + points.min(axis=0)) / 2
    return points / math.sqrt(_polygon_area(points))


def render_background(
    rng: np.random.Generator, width: int, height: int, colour: np.ndarray
) -> np.ndarray:
    """A gradient with noise of several frequencies and, at times, stripes.

    Args:
        rng: source of all random choices.
        width, height: in pixels.
        colour: (3,) mean colour, BGR in [0, 255].

    Returns:
        (H, W, 3) float32, about [0, 255], not clipped.
    """
    other = rng.uniform(-35, 35, 3).astype(np.float32)
    gradient = _gradient(rng, width, height)
    canvas = colour.astype(np.float32) + gradient[..., None] * other
    for cells, strength in ((3, 18), (9, 14), (30, 9)):
        noise = _smooth_noise(rng, width, height, cells) * rng.uniform(0, strength)
        canvas += noise[..., None]
    if rng.random() < 0.4:
        stripes = _stripes(rng, width, height) * rng.uniform(4, 18)
        canvas += stripes[..., None]
    return canvas.astype(np.float32, copy=False)


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
    """Write a dataset, or find that it is there already.

    Everything is written to a folder beside ``out_dir`` that takes its place when it is
    complete, so ``out_dir`` never holds half a dataset.

    Args:
        config: what to generate.
        out_dir: where to; missing parents are made.
        workers: processes, >= 1; the output does not depend on it.
        overwrite: replace a dataset of other parameters. A folder that holds anything
            else than a dataset of this generator is never replaced.
        on_image: called after each image, for a progress bar.

    Returns:
        True if the dataset was written; False if a complete one of the same parameters
        was there, which is left as it is.

    Raises:
        FileExistsError: if ``out_dir`` holds something else.
        TypeError: if ``workers`` is not an integer.
        ValueError: if ``workers`` is less than 1.
        OSError: if the folder cannot be written.
    """
    _check_int('workers', workers, 1)
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


def _check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if value < minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')


# Outlines ---------------------------------------------------------------------------


def _on_circle(angles: np.ndarray) -> np.ndarray:
    """(P, 2) points of the unit circle at (P,) angles in radians."""
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _crescent() -> np.ndarray:
    """(P, 2) outline of a unit disc without a disc of radius ``r`` around (d, 0)."""
    d, r = 0.45, 0.8
    crossing = (d * d + 1 - r * r) / (2 * d)  # x of the points where the circles meet
    start = math.acos(crossing)
    outer = _on_circle(np.linspace(start, 2 * np.pi - start, 32))
    start = math.acos((crossing - d) / r)
    inner = _on_circle(np.linspace(2 * np.pi - start, start, 24)) * r + (d, 0)
    return np.concatenate([outer, inner[1:-1]])


def _polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _draw_polygon(rng: np.random.Generator, name: str, size: float) -> np.ndarray:
    """(P, 2) outline with area ``size`` squared px^2, squeezed and turned at random."""
    ratio = math.sqrt(rng.uniform(1, MAX_ASPECT_RATIO))
    angle = rng.uniform(0, 2 * math.pi)
    sine, cosine = math.sin(angle), math.cos(angle)
    squeezed = shape_polygon(name) * (size * ratio**0.5, size / ratio**0.5)
    return squeezed @ np.array([(cosine, sine), (-sine, cosine)])


def _draw_sizes(rng: np.random.Generator, config: ShapesConfig) -> list[float]:
    """Square roots of the areas of an image's shapes, in drawing order."""
    cap = MAX_SIZE_SHARE * min(config.image_size)
    ranges = [(low, min(high, cap), p) for low, high, p in SIZE_RANGES if low < cap]
    weights = np.array([p for _, _, p in ranges])
    count = int(rng.integers(config.min_objects, config.max_objects + 1))
    sizes = []
    for choice in rng.choice(len(ranges), count, p=weights / weights.sum()):
        low, high, _ = ranges[choice]
        sizes.append(math.exp(rng.uniform(math.log(low), math.log(high))))
    # Roughly from large to small, or few small shapes would survive below large ones.
    keys = np.array(sizes) * rng.uniform(0.6, 1.6, count)
    return [sizes[i] for i in np.argsort(-keys, kind='stable')]


# Placement --------------------------------------------------------------------------


def _place(
    rng: np.random.Generator,
    polygon: np.ndarray,
    id_map: np.ndarray,
    areas: list[int],
    min_visible: float,
) -> _Shape | None:
    """Find a place where this shape and those below stay visible, or None."""
    height, width = id_map.shape
    extent = polygon.max(axis=0) - polygon.min(axis=0)
    visible = np.bincount(id_map.ravel(), minlength=len(areas) + 1)
    for _ in range(PLACEMENT_TRIES):
        # At most a quarter of the box may reach over each border.
        centre = extent / 4 + rng.random(2) * ((width, height) - extent / 2)
        shape = _rasterise(polygon + centre)
        mask, window = shape.crop(width, height)
        if np.count_nonzero(mask) < min_visible * np.count_nonzero(shape.mask):
            continue
        hidden = np.bincount(id_map[window][mask], minlength=len(areas) + 1)
        if np.all((visible - hidden)[1:] >= min_visible * np.array(areas)):
            return shape
    return None


def _rasterise(polygon: np.ndarray) -> _Shape:
    """Fill a (P, 2) float outline in pixels, on a canvas that holds all of it."""
    corner = np.floor(polygon.min(axis=0)).astype(int) - 1
    columns, rows = np.ceil(polygon.max(axis=0)).astype(int) + 2 - corner
    mask = np.zeros((rows, columns), np.uint8)
    # OpenCV counts from pixel centres, hence the half pixel.
    points = np.rint((polygon - corner - 0.5) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(mask, [points], 1, cv2.LINE_8, _SUBPIXEL_BITS)
    return _Shape(mask.astype(bool), (int(corner[0]), int(corner[1])))


# Colours and textures ---------------------------------------------------------------


def _draw_colour(rng: np.random.Generator, used: list[np.ndarray]) -> np.ndarray:
    """(3,) colour in [15, 240] that stands out from those used in the image."""
    candidates = rng.uniform(15, 240, (6, 3))
    gaps = np.linalg.norm(candidates[:, None] - np.stack(used)[None], axis=2)
    return candidates[gaps.min(axis=1).argmax()]


def _paint(
    rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, colour: np.ndarray
) -> None:
    """Fill the mask (h, w) in the view ``canvas`` (h, w, 3) with a textured colour."""
    height, width = mask.shape
    kinds = (None, _gradient, _stripes, partial(_smooth_noise, cells=6))
    kind = kinds[rng.integers(len(kinds))]
    strength = rng.uniform(10, 32)
    filled = np.broadcast_to(colour.astype(np.float32), (height, width, 3))
    if kind is not None:
        filled = filled + (kind(rng, width, height) * strength)[..., None]
    canvas[mask] = filled[mask]


def _gradient(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(H, W) float32 in [-1, 1], linear in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(math.cos(angle))
    y = np.linspace(-1, 1, height, dtype=np.float32) * np.float32(math.sin(angle))
    reach = abs(math.cos(angle)) + abs(math.sin(angle))
    return (x[None] + y[:, None]) / np.float32(reach)


def _stripes(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(H, W) float32 in [-1, 1], waves of a random direction, 5 to 24 pixels long."""
    angle, phase = rng.uniform(0, 2 * math.pi, 2)
    wave_number = 2 * math.pi / rng.uniform(5, 24)
    x = np.arange(width) * (wave_number * math.cos(angle)) + phase
    y = np.arange(height) * (wave_number * math.sin(angle))
    # sin(x + y) from the axes: far fewer sines than one a pixel.
    waves = np.outer(np.cos(y), np.sin(x)) + np.outer(np.sin(y), np.cos(x))
    return waves.astype(np.float32)


def _smooth_noise(
    rng: np.random.Generator, width: int, height: int, cells: int
) -> np.ndarray:
    """(H, W) float32 in [-1, 1], ``cells`` random values along the longer side."""
    longer = max(width, height)
    grid = (
        math.ceil(height * cells / longer) + 1,
        math.ceil(width * cells / longer) + 1,
    )
    values = rng.uniform(-1, 1, grid).astype(np.float32)
    return cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR)


def _finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Soften the outlines, add sensor noise: (H, W, 3) float32 -> uint8."""
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    image = cv2.GaussianBlur(image, (3, 3), 0)
    level = int(rng.integers(1, 12))
    noise = rng.integers(-level, level, image.shape, np.int8, endpoint=True)
    return np.clip(image.astype(np.int16) + noise, 0, 255).astype(np.uint8)


# Files ------------------------------------------------------------------------------


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
    if overwrite:
        return False
    raise FileExistsError(
        f'{out_dir} {reason}; overwrite it (--overwrite) or give another folder'
    )


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
    """Say which parameters differ: ``seed 0, wanted 1``."""
    return ', '.join(
        f'{name} {metadata.get(name)}, wanted {value}'
        for name, value in config.metadata().items()
        if metadata.get(name) != value
    )


@contextmanager
def _replaced_when_done(out_dir: Path) -> Iterator[Path]:
    """A new folder beside ``out_dir`` that takes its place if the block ends well."""
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
