"""Pictures of the attention to detections: which queries, and where images lie."""

from collections.abc import Sequence

import numpy as np
from mmdet.structures import DetDataSample

from .record import RecordedAttention
from .sampling import draw_attention

DETECTIONS = 3  # whose centres are the queries


def draw_detections(
    image: np.ndarray,
    record: RecordedAttention,
    result: DetDataSample,
    points: Sequence[tuple[float, float]] | None = None,
    *,
    index: int = 0,
    heads: Sequence[int] | None = None,
):
    """:func:`draw_attention` for an image of a batch that a detector has seen.

    Args:
        image: (h, w, 3), RGB, uint8, as it was before it was resized.
        record: Of :func:`record_attention`.
        result: What the detector found in the image.
        points: (x, y) in pixels of the image, whose nearest queries are drawn; None for
            the centres of the best detections.
        index: Of the image in the batch.
        heads: Query heads to draw; None for the first eight.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: For a point outside of the image, or a head that does not exist.
    """
    points = best_centres(result) if points is None else points
    height, width = result.ori_shape
    area = area_of(result)
    queries = []
    for x, y in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(
                f'points must lie in the image of {width} x {height}, got {x:g},{y:g}'
            )
        place = x / width * area[0], y / height * area[1]
        queries.append(record.nearest_query(index, place))
    queries = list(dict.fromkeys(queries))  # once each
    return draw_attention(image, record, queries, index=index, area=area, heads=heads)


def best_centres(result: DetDataSample) -> list[tuple[float, float]]:
    """Centres of the best detections in pixels; that of the image if there are none."""
    found = result.pred_instances
    best = found.scores.argsort(descending=True)[:DETECTIONS]
    height, width = result.ori_shape
    if len(best) == 0:
        return [(width / 2, height / 2)]
    boxes = found.bboxes[best]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return [
        (min(max(x, 0), width), min(max(y, 0), height)) for x, y in centres.tolist()
    ]


def area_of(result: DetDataSample) -> tuple[float, float]:
    """How far the image reaches in the batch, which may be padded: (x, y) up to 1."""
    height, width = result.img_shape
    batch_height, batch_width = result.get('batch_input_shape', (height, width))
    return width / batch_width, height / batch_height
