"""What is exported: a backbone, or a one-stage detector from pixels to boxes."""

import copy
import math

import torch
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from deform_gqa.models import DAT
from deform_gqa.models.layers import (
    DeformableGQA,
    NeighborhoodAttention,
    ShiftedWindowAttention,
)

from .nms import nms_mask

# Maps of all strides then divide evenly, whatever the size.
SIZE_DIVISOR = 32  # pixels
HEADS = ('RetinaHead', 'RetinaSepBNHead', 'RTMDetHead', 'RTMDetSepBNHead')
EMPTY = -1.0  # score of what is no detection


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose operators are plain torch code.

    The backend 'naive' is the definition of each operator. It calls none of the
    package's own ops, which only torch with this package can run.
    """
    module = copy.deepcopy(module).eval().requires_grad_(False)
    for part in module.modules():
        if hasattr(part, 'backend'):
            part.backend = 'naive'
    return module


def least_side(backbone: nn.Module) -> int:
    """The least height and width that an exported backbone takes, in pixels.

    Smaller maps need padding inside attention, or grids of a single cell, and a graph
    has no branches for them. Other backbones than DAT have no such bound.
    """
    least = SIZE_DIVISOR
    for stage, blocks in enumerate(getattr(backbone, 'stages', ())):
        if not isinstance(backbone, DAT):
            break
        side = max(map(_least_map_side, blocks.attns))
        least = max(least, side * 4 * 2**stage)
    return math.ceil(least / SIZE_DIVISOR) * SIZE_DIVISOR


def _least_map_side(attention: nn.Module) -> int:
    if isinstance(attention, NeighborhoodAttention):
        return attention.kernel_size * attention.dilation
    if isinstance(attention, ShiftedWindowAttention):
        return max(attention.window_size) + 1
    if isinstance(attention, DeformableGQA):  # two sampled cells
        padding = attention.conv_offset[0].padding[0]
        return attention.stride + attention.offset_kernel_size - 2 * padding
    return 2


class BackboneGraph(nn.Module):
    """A backbone: normalised images (B, 3, H, W) -> one map for each output."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = plain_copy(backbone)
        self.least_side = least_side(backbone)
        self.output_names = [f'map{i}' for i in self.backbone.out_indices]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images))


class DetectorGraph(nn.Module):
    """A one-stage detector with everything from the pixels to the boxes.

    Takes images (B, 3, H, W), float32 from 0 to 255, in the channel order of
    ``cv2.imread``, resized as in the config's test pipeline. H and W are multiples of
    32 and at least ``least_side``: pad with the ``mean`` of the config's preprocessor,
    which normalises to 0. Returns, sorted by score and filled up to ``max_per_img``,

    - ``boxes`` (B, max_per_img, 4), corners (x1, y1, x2, y2) in pixels of the input,
    - ``scores`` (B, max_per_img), 0 where there is no more detection,
    - ``labels`` (B, max_per_img), int64, -1 where there is no more detection.

    Raises:
        ValueError: For a detector or a post-processing that has no such graph.
    """

    output_names = ('boxes', 'scores', 'labels')

    def __init__(self, detector: nn.Module):
        super().__init__()
        _check_detector(detector)
        detector = plain_copy(detector)
        self.least_side = least_side(detector.backbone)
        self.backbone, self.head = detector.backbone, detector.bbox_head
        self.neck = detector.neck if detector.with_neck else nn.Identity()
        preprocessor = detector.data_preprocessor
        self.swap_channels = preprocessor._channel_conversion
        shape = (1, 3, 1, 1)
        mean, std = torch.zeros(shape), torch.ones(shape)
        if preprocessor._enable_normalize:
            mean = preprocessor.mean.reshape(shape).clone()
            std = preprocessor.std.reshape(shape).clone()
        self.register_buffer('mean', mean)
        self.register_buffer('std', std)
        self.cfg = self.head.test_cfg

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = images.flip(1) if self.swap_channels else images
        features = self.neck(self.backbone((x - self.mean) / self.std))
        boxes, scores, labels = self._candidates(*self.head(features)[:2])
        height, width = images.shape[2:]
        boxes = torch.stack(
            [
                side.clamp(0, limit)
                for side, limit in zip(
                    boxes.unbind(-1), (width, height, width, height), strict=True
                )
            ],
            dim=-1,
        )
        least = self.cfg.get('min_bbox_size', -1)
        if least >= 0:
            sides = boxes[..., 2:] - boxes[..., :2]
            scores = torch.where((sides > least).all(-1), scores, EMPTY)
        kept = nms_mask(
            boxes,
            scores,
            labels,
            self.head.num_classes,
            self.cfg.nms.iou_threshold,
            float(self.cfg.get('score_thr', 0)),
        )
        scores = torch.where(kept > 0, scores, EMPTY)
        count = min(self.cfg.max_per_img, scores.shape[1])
        scores, index = scores.topk(count)
        boxes = boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
        found = scores > EMPTY
        labels = torch.where(found, labels.gather(1, index), -1)
        return boxes, torch.where(found, scores, 0.0), labels

    def _candidates(
        self, cls_scores: list[Tensor], box_preds: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, N, 4), scores and labels (B, N) of the best of all levels."""
        priors = self.head.prior_generator.grid_priors(
            [x.shape[2:] for x in cls_scores],
            dtype=cls_scores[0].dtype,
            device=cls_scores[0].device,
        )
        levels = [
            self._level(*level)
            for level in zip(cls_scores, box_preds, priors, strict=True)
        ]
        boxes, scores, labels = (torch.cat(x, dim=1) for x in zip(*levels, strict=True))
        return boxes, scores, labels

    def _level(self, cls_score: Tensor, box_pred: Tensor, priors: Tensor):
        """As :meth:`_candidates`, of one level; N is ``nms_pre``."""
        classes = self.head.cls_out_channels
        scores = cls_score.permute(0, 2, 3, 1).flatten(1).sigmoid()
        # Filled up, so that there are as many at every size of the image.
        filling = scores.new_full((1, self.cfg.nms_pre), EMPTY)
        filled = torch.cat([scores, filling.expand(scores.shape[0], -1)], dim=1)
        best, index = filled.topk(self.cfg.nms_pre)
        index = torch.where(best > EMPTY, index, 0)
        labels = index % classes
        prior = torch.div(index, classes, rounding_mode='floor')
        deltas = box_pred.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (-1, 4))
        deltas = deltas.flatten(1, 2).gather(1, prior.unsqueeze(2).expand(-1, -1, 4))
        boxes = self.head.bbox_coder.decode(
            priors[prior.flatten()], deltas.flatten(0, 1)
        )
        return get_box_tensor(boxes).unflatten(0, index.shape), best, labels


def _check_detector(detector: nn.Module) -> None:
    """Raises ValueError for what :class:`DetectorGraph` does not compute."""
    head = getattr(detector, 'bbox_head', None)
    name = type(detector).__name__
    if type(head).__name__ not in HEADS:
        raise ValueError(
            f'{name} with the head {type(head).__name__} cannot be exported end to '
            f'end; heads that can: {", ".join(HEADS)}. Its backbone can be exported'
        )
    cfg = head.test_cfg
    if cfg.get('nms', {}).get('type') != 'nms':
        raise ValueError(
            "test_cfg.nms must be dict(type='nms', ...) for the export of a detector, "
            f'got {cfg.get("nms")}'
        )
    for option in ('nms_pre', 'max_per_img'):
        if cfg.get(option, -1) < 1:
            raise ValueError(
                f'test_cfg.{option} must be at least 1 for the export of a detector, '
                f'got {cfg.get(option)}'
            )
    if not head.use_sigmoid_cls:
        raise ValueError(
            'loss_cls.use_sigmoid must be True for the export of a detector, got False'
        )
