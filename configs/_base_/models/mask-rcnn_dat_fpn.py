"""Mask R-CNN with DAT-T++, multi-head as published."""

_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(_delete_=True, type='DAT', arch='t++'),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
