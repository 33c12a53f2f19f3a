"""Draws the images of the synthetic shapes dataset (``shapes.py``)."""

import math
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np

from deform_gqa.checks import check_int

from .shapes_config import CLASSES, SPLITS, ShapesConfig

# Ranges of the square root of a shape's whole area, in pixels, and the share of shapes
# in each. The bounds lie a little inside those of COCO (32 and 96), as occlusion takes
# area away.
SIZE_RANGES = ((16.0, 31.0, 0.4), (34.0, 94.0, 0.38), (102.0, math.inf, 0.22))
MAX_SIZE_SHARE = 0.66  # of the shorter image side
MAX_ASPECT_RATIO = 1.5
PLACEMENT_TRIES = 16
_SUBPIXEL_BITS = 4


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
    """Mask (h, w) bool of a whole shape and its upper left corner (x, y)."""

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
    """Draw image ``index`` of ``split``; the counts of ``config`` are ignored.

    Raises:
        TypeError: if ``index`` is not an integer.
        ValueError: if ``split`` is unknown or ``index`` negative.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {SPLITS}, got {split!r}')
    check_int('index', index, 0)
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
    # Roughly from large to small, small shapes below large ones would rarely survive.
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
    """Find a position where this shape and those below stay visible, or None."""
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
    """Rasterise a (P, 2) float outline, in pixels, on a canvas that holds all of it."""
    corner = np.floor(polygon.min(axis=0)).astype(int) - 1
    columns, rows = np.ceil(polygon.max(axis=0)).astype(int) + 2 - corner
    mask = np.zeros((rows, columns), np.uint8)
    # OpenCV counts from pixel centres, hence the half pixel.
    points = np.rint((polygon - corner - 0.5) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(mask, [points], 1, cv2.LINE_8, _SUBPIXEL_BITS)
    return _Shape(mask.astype(bool), (int(corner[0]), int(corner[1])))


# Colours and textures ---------------------------------------------------------------


def _draw_colour(rng: np.random.Generator, used: list[np.ndarray]) -> np.ndarray:
    """(3,) colour in [15, 240] that differs clearly from those used in the image."""
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
    # sin(x + y) from sines along the axes, which are far fewer than the pixels.
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
