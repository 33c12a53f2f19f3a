"""Mask R-CNN with a small DAT-GQA on synthetic shapes."""

_base_ = [
    '../_base_/models/mask-rcnn_dat-gqa-mini_fpn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/adamw_cosine.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/default_runtime.py',
]

model = dict(
    roi_head=dict(bbox_head=dict(num_classes=6), mask_head=dict(num_classes=6))
)
visualizer = dict(alpha=0.4)  # drawn masks do not hide the image
