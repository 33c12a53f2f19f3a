"""Non-maximum suppression as one op: torch runs mmcv's, ONNX has NonMaxSuppression."""

import torch
from mmcv.ops import batched_nms
from torch import Tensor


@torch.library.custom_op('deform_gqa_export::nms_mask', mutates_args=())
def nms_mask(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    num_classes: int,
    iou_threshold: float,
    score_threshold: float,
) -> Tensor:
    """Which boxes of each image are kept, among those of one class.

    Args:
        boxes: (B, N, 4) corners (x1, y1, x2, y2) in pixels, float32.
        scores: (B, N), float32.
        labels: (B, N), int64, 0 to ``num_classes`` - 1.
        num_classes: Number of classes.
        iou_threshold: A box is dropped if its IoU with a better one is larger.
        score_threshold: Boxes of no higher score are dropped.

    Returns:
        (B, N), float32: 1 for the boxes that are kept, else 0.
    """
    mask = torch.zeros_like(scores)
    options = dict(type='nms', iou_threshold=iou_threshold)
    for image in range(boxes.shape[0]):
        (index,) = (scores[image] > score_threshold).nonzero(as_tuple=True)
        if len(index) == 0:
            continue
        per_box = (x[image, index].contiguous() for x in (boxes, scores, labels))
        _, kept = batched_nms(*per_box, options)
        mask[image, index[kept]] = 1
    return mask


@nms_mask.register_fake
def _(boxes, scores, labels, num_classes, iou_threshold, score_threshold):
    return torch.empty_like(scores)


def nms_mask_onnx(
    boxes, scores, labels, num_classes, iou_threshold, score_threshold
):  # as torch.onnx calls it: with values of the graph and plain numbers
    """The nodes that stand for :func:`nms_mask` in ONNX."""
    from onnxscript import opset18 as op

    zero, one = (op.Constant(value_ints=[i]) for i in (0, 1))
    classes = op.Constant(value_ints=list(range(num_classes)))
    classes = op.Unsqueeze(classes, op.Constant(value_ints=[0, 2]))
    # (B, classes, N): each box has its score in its own class only.
    per_class = op.Where(
        op.Equal(op.Unsqueeze(labels, one), classes),
        op.Unsqueeze(scores, one),
        op.Constant(value_float=score_threshold - 1.0),
    )
    # (K, 3): image, class and box
    selected = op.NonMaxSuppression(
        boxes,
        per_class,
        op.Constant(value_ints=[2**31 - 1]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[score_threshold]),
    )
    index = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
    count = op.Slice(op.Shape(selected), zero, one)
    kept = op.Expand(op.Constant(value_float=1.0), count)
    nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    return op.ScatterND(nothing, index, kept)
