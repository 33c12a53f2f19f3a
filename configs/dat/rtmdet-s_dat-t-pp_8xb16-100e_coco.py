"""RTMDet with DAT-T++ and the neck and head of RTMDet-s, 100 epochs.

The schedule is that of RTMDet with a pretrained transformer (rtmdet_l_swin_b).
"""

_base_ = [
    'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
    '../_base_/default_runtime.py',
]

model = dict(
    # RGB, as the backbone was pretrained; RTMDet's own takes BGR.
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(
        _delete_=True, type='DAT', arch='t++', out_indices=(1, 2, 3), drop_path_rate=0.1
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
train_dataloader = dict(batch_size=16)

max_epochs = 100
stage2_num_epochs = 10
base_lr = 0.001
train_cfg = dict(
    max_epochs=max_epochs, dynamic_intervals=[(max_epochs - stage2_num_epochs, 1)]
)
optim_wrapper = dict(
    optimizer=dict(lr=base_lr),
    paramwise_cfg=dict(
        custom_keys={
            'rpe_table': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
            'rpb': dict(decay_mult=0.0),
        }
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-5, by_epoch=False, begin=0, end=1000),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.05,
        begin=max_epochs // 2,
        end=max_epochs,
        T_max=max_epochs // 2,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=0.0002,
        update_buffers=True,
        priority=49,
    ),
    dict(
        type='PipelineSwitchHook',
        switch_epoch=max_epochs - stage2_num_epochs,
        switch_pipeline={{_base_.train_pipeline_stage2}},
    ),
]
auto_scale_lr = dict(base_batch_size=128)
val_evaluator = dict(type='AutoCocoMetric')
test_evaluator = dict(type='AutoCocoMetric')
