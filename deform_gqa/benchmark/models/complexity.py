"""Parameters and FLOPs of a detector, from its config alone."""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from torch import nn

from ..core.flops import count_flops

# Papers count images of the usual COCO scale at this width.
_COCO_SCALE, _COCO_SIZE = (1333, 800), (800, 1280)
_NUM_MASKS = 100  # detections of an image


@dataclasses.dataclass(frozen=True)
class Complexity:
    """What a detector costs.

    Attributes:
        size: Height and width of the image, in pixels.
        parameters: Of the whole detector, those that are frozen included.
        backbone_parameters: Of its backbone.
        multiply_adds: Of the network for one image, before post-processing; two-stage
            detectors with all the proposals that they may keep, and 100 masks.
    """

    size: tuple[int, int]
    parameters: int
    backbone_parameters: int
    multiply_adds: int


def image_size(cfg: Config) -> tuple[int, int]:
    """Height and width, in pixels, that a config tests images at.

    It is the scale of its Resize, and (800, 1280) for the usual one of COCO, as in
    papers.

    Raises:
        ValueError: If the test pipeline has no Resize with a scale.
    """
    for step in cfg.test_dataloader.dataset.pipeline:
        if step['type'] == 'Resize' and 'scale' in step:
            scale = tuple(step['scale'])
            return _COCO_SIZE if scale == _COCO_SCALE else scale[::-1]
    raise ValueError('the test pipeline has no Resize with a scale; give size')


def count_parameters(module: nn.Module) -> int:
    """Numbers in the parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def measure_complexity(
    cfg: Config | Mapping[str, Any], size: Sequence[int] | None = None
) -> Complexity:
    """Counts the parameters and multiply-adds of a config's detector.

    Multiply-adds of convolutions, linear layers and attention, fused or not, are
    counted, by :func:`deform_gqa.benchmark.core.flops.count_flops`; they are not
    computed. Needs no data and no weights, and seconds at the size of COCO.

    Args:
        cfg: Config of MMDetection.
        size: Height and width of the image, in pixels; by default ``image_size(cfg)``.

    Raises:
        ValueError: If ``size`` is not given, and the config does not say it.
    """
    size = tuple(size) if size is not None else image_size(cfg)
    register_all_modules()
    model = revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model))).eval()
    if hasattr(model, 'level_embed'):  # any memory until init_weights
        nn.init.zeros_(model.level_embed)
    sample = DetDataSample(
        metainfo=dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )
    images = torch.zeros(1, 3, *size)
    parameters = count_parameters(model), count_parameters(model.backbone)
    with torch.no_grad():
        flops = _cascaded_masks(model)
        flops += count_flops(lambda: model(images, [sample], mode='tensor'), False)
    return Complexity(size, *parameters, flops // 2)


def _cascaded_masks(model: nn.Module) -> int:
    """FLOPs of the mask heads of a cascade, which are then taken out of the model.

    Its own forward draws the masks of all proposals, not of the detections.
    """
    roi_head = getattr(model, 'roi_head', None)
    heads = getattr(roi_head, 'mask_head', None)
    if not isinstance(heads, nn.ModuleList):
        return 0
    roi_head.mask_head = None
    flops = 0
    for head, extractor in zip(heads, roi_head.mask_roi_extractor, strict=True):
        size = extractor.roi_layers[0].output_size
        rois = torch.zeros(_NUM_MASKS, extractor.out_channels, *size)
        flops += count_flops(functools.partial(head, rois), False)
    return flops
