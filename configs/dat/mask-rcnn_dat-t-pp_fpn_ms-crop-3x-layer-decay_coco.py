"""Mask R-CNN with DAT-T++, 36 epochs, lower learning rates for earlier layers.

The stem learns with a quarter of the rate of the heads (0.95 to the power of 27).
"""

_base_ = './mask-rcnn_dat-t-pp_fpn_ms-crop-3x_coco.py'

optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=0.95, decay_type='layer_wise'),
)
