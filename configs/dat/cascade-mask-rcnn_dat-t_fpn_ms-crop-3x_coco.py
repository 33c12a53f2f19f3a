"""Cascade Mask R-CNN with DAT-T, 36 epochs."""

_base_ = './cascade-mask-rcnn_dat-t-pp_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(arch='t', drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
