"""Mask R-CNN with DAT-T++, 12 epochs."""

_base_ = [
    '../_base_/models/mask-rcnn_dat_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/dat_1x.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/default_runtime.py',
]
