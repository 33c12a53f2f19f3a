"""RetinaNet with a small DAT-GQA on synthetic shapes: minutes on two CPU cores."""

_base_ = [
    '../_base_/models/retinanet_dat-gqa-mini_fpn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/adamw_cosine.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/default_runtime.py',
]

model = dict(bbox_head=dict(num_classes=6))
max_epochs = 12
optim_wrapper = dict(optimizer=dict(lr=5e-4))
train_cfg = dict(max_epochs=max_epochs, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.002, gamma=100)
]
val_evaluator = dict(metric='bbox')
test_evaluator = dict(metric='bbox')
visualizer = dict(alpha=0.4)  # drawn masks do not hide the image
