"""COCO annotation files: categories, polygons that match a mask, safe writing."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np


def coco_categories(classes: Sequence[str]) -> list[dict[str, Any]]:
    """Category records in the given order, with ids from 1 as in COCO."""
    return [
        {'id': index, 'name': name, 'supercategory': 'none'}
        for index, name in enumerate(classes, start=1)
    ]


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` with sorted keys; equal data gives equal bytes.

    The text is written to a file beside ``path`` that then replaces it, so ``path``
    never holds half a document, and an older document is lost only to a complete one.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If ``data`` holds NaN or infinity, which JSON cannot express.
    """
    path = Path(path)
    text = json.dumps(data, sort_keys=True, separators=(',', ':'), allow_nan=False)
    temporary = path.with_name(f'.{path.name}.tmp-{os.getpid()}')
    try:
        with open(temporary, 'w', encoding='utf-8', newline='\n') as file:
            file.write(text + '\n')
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def mask_to_polygons(
    mask: np.ndarray, offset: tuple[int, int] = (0, 0)
) -> list[list[int]]:
    """Polygons along the pixel edges of a mask.

    When pycocotools rasterises them, the result is exactly the mask. The polygon of
    pixel centres, which ``cv2.findContours`` returns, would lose half a pixel on every
    side. COCO polygons cannot have holes: a mask with holes is cut through them, and
    the polygons of its parts lie side by side.

    Args:
        mask: (H, W), bool or integer, non-zero inside.
        offset: (x, y) in pixels, added to every vertex; for a cropped mask.

    Returns:
        For each polygon one flat list ``[x0, y0, x1, y1, ...]`` of integer pixel edges
        (pixel (x, y) spans x to x + 1), x in [0, W] and y in [0, H] before the offset.
        An empty mask gives an empty list.

    Raises:
        ValueError: If ``mask`` does not have two dimensions.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f'mask must have shape (H, W), got {mask.shape}')
    polygons = []
    for part, left in _parts_without_holes((mask != 0).astype(np.uint8)):
        for contour in _contours(part)[0]:
            vertices = _edge_polygon(contour) + (left + offset[0], offset[1])
            polygons.append(vertices.ravel().tolist())
    return polygons


def _contours(mask: np.ndarray) -> tuple[Sequence[np.ndarray], np.ndarray | None]:
    """Contours and hierarchy of a (H, W) uint8 mask enlarged twice."""
    # Enlarged, each pixel edge lies between two pixel centres: see _edge_polygon.
    # OpenCV also treats pixels at the image border differently, hence the padding.
    enlarged = np.pad(mask.repeat(2, axis=0).repeat(2, axis=1), 1)
    return cv2.findContours(
        enlarged, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(-1, -1)
    )


def _edge_polygon(contour: np.ndarray) -> np.ndarray:
    """Pixel-edge vertices (P, 2) of a contour (Q, 1, 2) of the enlarged mask."""
    # Pixel i covers the columns 2i and 2i + 1; its edges i and i + 1 come out.
    vertices = (contour[:, 0, :] + 1) // 2
    vertices = vertices[(vertices != np.roll(vertices, 1, axis=0)).any(axis=1)]
    before = vertices - np.roll(vertices, 1, axis=0)
    after = np.roll(vertices, -1, axis=0) - vertices
    # All sides are horizontal or vertical: a vertex is where the direction changes.
    return vertices[(np.sign(before) != np.sign(after)).any(axis=1)]


def _parts_without_holes(mask: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Cut a (H, W) uint8 mask at columns through its holes: [(part, left column)]."""
    parts, pending = [], [(mask, 0)]
    while pending:
        part, left = pending.pop()
        cut = _column_through_hole(part)
        if cut is None:
            parts.append((part, left))
        else:
            pending += [(part[:, cut:], left + cut), (part[:, :cut], left)]
    return parts


def _column_through_hole(mask: np.ndarray) -> int | None:
    """The middle column of a hole of the mask, None if it has no hole."""
    contours, hierarchy = _contours(mask)
    for index, contour in enumerate(contours):
        if hierarchy[0, index, 3] >= 0:
            columns = contour[:, 0, 0]
            # The contour is the ring around the hole, so its middle is inside it.
            return int(columns.min() + columns.max()) // 4
    return None
