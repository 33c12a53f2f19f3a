"""Mask R-CNN with DAT-T++, 36 epochs, validated with the mean of recent weights."""

_base_ = './mask-rcnn_dat-t-pp_fpn_ms-crop-3x_coco.py'

custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=0.0002,
        update_buffers=True,
        priority=49,
    )
]
