"""Cascade Mask R-CNN with DAT-T++, 36 epochs."""

_base_ = [
    '../_base_/models/cascade-mask-rcnn_dat_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/dat_3x.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(drop_path_rate=0.1))
