"""Tiny models with the blocks of DAT++, in configs that the export's tests share."""

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config

ARCH = dict(
    embed_dims=(8, 16, 24, 32),
    depths=(1, 1, 1, 1),
    num_heads=(2, 2, 3, 4),
    block_types=('N', 'D', 'N', 'D'),
    offset_groups=(1, 2, 3, 4),
    table_sizes=(8, 4, 2, 2),
    neighborhood_sizes=(3, 3, 3, 3),
    mlp_ratio=(1, 1, 1, 1),
)
# Tracing takes seconds a block: two stages, the others are not built.
BACKBONE = dict(type='DAT', arch=ARCH, num_kv_heads=1, out_indices=(0, 1))
TEST_CFG = dict(
    score_thr=0.02,
    nms_pre=100,
    max_per_img=20,
    min_bbox_size=0,
    nms=dict(type='nms', iou_threshold=0.5),
)


def retinanet_config() -> Config:
    config = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    model = config.model
    model.backbone = BACKBONE
    model.neck.update(in_channels=[8, 16], out_channels=8, num_outs=3, start_level=0)
    model.bbox_head.update(
        num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1
    )
    model.bbox_head.anchor_generator.strides = [4, 8, 16]
    model.test_cfg = TEST_CFG
    return config


def rtmdet_config() -> Config:
    config = get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    model = config.model
    model.backbone = dict(BACKBONE, arch=dict(ARCH, block_types=('X', 'D', 'N', 'D')))
    norm = dict(type='BN')
    model.neck.update(
        in_channels=[8, 16], out_channels=8, num_csp_blocks=1, norm_cfg=norm
    )
    model.bbox_head.update(
        num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1, norm_cfg=norm
    )
    model.bbox_head.anchor_generator.strides = [4, 8]
    model.test_cfg = TEST_CFG
    return config


def build(config: Config) -> torch.nn.Module:
    """The detector with weights that find boxes of different scores."""
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        for parameter in model.bbox_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
