"""Detectors of MMDetection's own configs, shrunk."""

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

RESNET = dict(depth=18, init_cfg=None, base_channels=8)
IMAGES = (2, 3, 64, 96)


def tiny_detr() -> ConfigDict:
    model = _model('detr/detr_r50_8xb2-150e_coco.py')
    model.merge_from_dict(
        dict(
            backbone=RESNET,
            num_queries=7,
            neck=dict(in_channels=[64]),
            encoder=dict(num_layers=1),
            decoder=dict(num_layers=2),
        )
    )
    for part in ('encoder', 'decoder'):
        model[part].layer_cfg.ffn_cfg.feedforward_channels = 32
    return model


def tiny_dino() -> ConfigDict:
    model = _model('dino/dino-4scale_r50_8xb2-12e_coco.py')
    model.merge_from_dict(
        dict(
            backbone=RESNET,
            num_queries=9,
            neck=dict(in_channels=[16, 32, 64]),
            encoder=dict(num_layers=1),
            decoder=dict(num_layers=2),
        )
    )
    for part in ('encoder', 'decoder'):
        model[part].layer_cfg.ffn_cfg.feedforward_channels = 32
    return model


def tiny_swin_retinanet() -> ConfigDict:
    model = _model('swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py')
    model.merge_from_dict(
        dict(
            backbone=dict(
                embed_dims=16,
                depths=[2, 1, 1, 1],
                num_heads=[2, 4, 4, 4],
                init_cfg=None,
                window_size=4,
            ),
            neck=dict(in_channels=[32, 64, 128], out_channels=16),
            bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1),
        )
    )
    return model


DETECTORS = dict(detr=tiny_detr, dino=tiny_dino, swin=tiny_swin_retinanet)


def _model(name: str) -> ConfigDict:
    model = get_config(f'mmdet::{name}').model
    model.data_preprocessor.pad_size_divisor = 32
    return Config(model)


def build(config) -> nn.Module:
    """The detector in eval mode, with weights that make heads differ."""
    register_all_modules(init_default_scope=False)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if 'attn' in name and parameter.ndim < 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs() -> tuple[Tensor, list[DetDataSample]]:
    """Images of two sizes in one batch, so that transformers need masks."""
    torch.manual_seed(1)
    images = torch.randn(IMAGES)
    samples = []
    for height, width in ((64, 96), (64, 70)):
        meta = dict(img_shape=(height, width), batch_input_shape=IMAGES[2:])
        samples.append(DetDataSample(metainfo=meta))
    return images, samples


def outputs(model: nn.Module) -> list[Tensor]:
    """What the head returns, flattened."""
    return list(_flatten(model(*inputs(), mode='tensor')))


def _flatten(outs):
    if isinstance(outs, Tensor):
        yield outs
        return
    for out in outs:
        if out is not None:
            yield from _flatten(out)
