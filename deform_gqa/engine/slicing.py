"""Detection in large images by overlapping windows."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from mmcv.ops import batched_nms
from mmengine.structures import InstanceData
from torch import Tensor

from deform_gqa.checks import check_int, check_number

__all__ = ['detect_in_slices', 'slice_windows']

# Boxes of cut objects end this near to the window's border, in pixels.
BORDER = 2.0

Window = tuple[int, int, int, int]


def slice_windows(image_size: tuple[int, int], side: int, overlap: int) -> list[Window]:
    """Windows (x1, y1, x2, y2) that cover an image, row by row.

    The last window of a row or column ends where the image ends, so that all windows
    are as large as they can be.

    Args:
        image_size: (H, W) in pixels.
        side: Side of the square windows in pixels; of a smaller image, its own side.
        overlap: Pixels that neighbours share, at least.

    Raises:
        TypeError: If ``side`` or ``overlap`` is not an integer.
        ValueError: If ``side`` is below 1, or ``overlap`` not within 0 to ``side`` - 1.
    """
    check_int('side', side, 1)
    check_int('overlap', overlap, 0)
    if overlap >= side:
        raise ValueError(
            f'overlap must be less than the side of the windows, got overlap={overlap} '
            f'and side={side}'
        )
    rows, cols = (_spans(size, side, overlap) for size in image_size)
    return [(x1, y1, x2, y2) for (y1, y2), (x1, x2) in itertools.product(rows, cols)]


def _spans(size: int, side: int, overlap: int) -> list[tuple[int, int]]:
    if size <= side:
        return [(0, size)]
    starts = [*range(0, size - side, side - overlap), size - side]
    return [(start, start + side) for start in starts]


def detect_in_slices(
    image: np.ndarray,
    detect: Callable[[list[np.ndarray]], Sequence[InstanceData]],
    side: int,
    overlap: int,
    iou_threshold: float = 0.5,
) -> InstanceData:
    """Detects objects window by window and merges what neighbours both see.

    A box that ends at the inner border of a window is dropped if it lies well within
    the overlap, as the neighbour sees all of the object, or more of it. What is left is
    merged by mmcv's ``batched_nms``, class by class.

    Args:
        image: (H, W, 3).
        detect: From windows of the image to an InstanceData each, on the CPU, with
            ``bboxes`` (n, 4), ``scores`` (n,), ``labels`` (n,) and perhaps ``masks``
            (n, h, w).
        side: Side of the windows in pixels, see :func:`slice_windows`.
        overlap: Pixels that neighbours share. Objects that are smaller by a few pixels
            lie in some window as a whole.
        iou_threshold: Boxes of a class with a larger IoU are one object, in (0, 1].

    Returns:
        The detections in the image, sorted by score.

    Raises:
        TypeError: As :func:`slice_windows`, or if ``iou_threshold`` is not a number.
        ValueError: As :func:`slice_windows`, or if ``iou_threshold`` is out of range.
    """
    check_number('iou_threshold', iou_threshold)
    if not 0 < iou_threshold <= 1:
        raise ValueError(f'iou_threshold must be in (0, 1], got {iou_threshold}')
    size = image.shape[:2]
    windows = slice_windows(size, side, overlap)
    crops = [np.ascontiguousarray(image[y1:y2, x1:x2]) for x1, y1, x2, y2 in windows]
    found = [
        (window, _without_cut(instances, window, size, overlap))
        for window, instances in zip(windows, detect(crops), strict=True)
    ]
    boxes, scores, labels = (
        torch.cat([instances[name] for _, instances in found])
        for name in ('bboxes', 'scores', 'labels')
    )
    boxes = boxes + torch.cat(
        [boxes.new_tensor(w[:2] * 2).expand(len(x.scores), 4) for w, x in found]
    )
    kept = torch.zeros(0, dtype=torch.long)
    if len(boxes) > 0:  # mmcv's takes no empty list
        nms = dict(type='nms', iou_threshold=iou_threshold)
        _, kept = batched_nms(boxes, scores, labels, nms)
    merged = InstanceData(bboxes=boxes[kept], scores=scores[kept], labels=labels[kept])
    if 'masks' in found[0][1]:
        merged.masks = _place_masks(found, kept, size)
    return merged


def _without_cut(
    instances: InstanceData, window: Window, size: tuple[int, int], overlap: int
) -> InstanceData:
    """Without the boxes that a neighbouring window sees at least as much of."""
    height, width = size
    x1, y1, x2, y2 = window
    left, top, right, bottom = instances.bboxes.unbind(1)
    cut_x = _is_cut(left, right, x2 - x1, x1 > 0, x2 < width)
    cut_y = _is_cut(top, bottom, y2 - y1, y1 > 0, y2 < height)
    # Those that the neighbour sees away from its own border.
    most = overlap - 2 * BORDER
    cut = (cut_x & (right - left < most)) | (cut_y & (bottom - top < most))
    return instances[~cut]


def _is_cut(first: Tensor, last: Tensor, side: int, before: bool, after: bool):
    """Whether boxes end at a border of the window beyond which there is more image."""
    at_start = (first <= BORDER) & before
    return at_start | ((last >= side - BORDER) & after)


def _place_masks(
    found: list[tuple[Window, InstanceData]], kept: Tensor, size: tuple[int, int]
) -> Tensor:
    """(len(kept), H, W), bool: the masks of the windows where they lie in the image."""
    places = [(w, mask) for w, instances in found for mask in instances.masks]
    masks = torch.zeros((len(kept), *size), dtype=torch.bool)
    for out, index in zip(masks, kept.tolist(), strict=True):
        (x1, y1, x2, y2), mask = places[index]
        out[y1:y2, x1:x2] = mask
    return masks
