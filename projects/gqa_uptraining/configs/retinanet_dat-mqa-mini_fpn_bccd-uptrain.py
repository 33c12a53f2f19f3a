"""Converts the multi-head detector to one kv head a block and trains it 5 % longer."""

_base_ = './retinanet_dat-mha-mini_fpn_bccd.py'

model = dict(backbone=dict(num_kv_heads=1))
load_from = 'work_dirs/gqa_uptraining/seed0/base/epoch_24.pth'
custom_hooks = [
    dict(type='GQAConversionHook'),
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.002, gamma=100),
]

max_iters = 62  # 5 % of 24 epochs of 52 iterations
warmup_iters = 6
optim_wrapper = dict(optimizer=dict(lr=3e-5))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warmup_iters),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        by_epoch=False,
        begin=0,
        end=max_iters,
    ),
]
train_cfg = dict(
    _delete_=True,
    type='IterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=max_iters,
)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=50))
log_processor = dict(by_epoch=False)
