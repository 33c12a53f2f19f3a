"""Cascade Mask R-CNN with DAT-B, 36 epochs."""

_base_ = './cascade-mask-rcnn_dat-t-pp_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(arch='b', drop_path_rate=0.5),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
