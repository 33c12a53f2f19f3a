"""RetinaNet with a small DAT-GQA on BCCD, from scratch."""

_base_ = [
    '../_base_/models/retinanet_dat-gqa-mini_fpn.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/adamw_cosine.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/default_runtime.py',
]

model = dict(bbox_head=dict(num_classes=3))
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.002, gamma=100)
]
