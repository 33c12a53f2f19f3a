"""RetinaNet with a DAT-GQA of 2 million parameters, for small images on CPUs."""

_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'

norm_cfg = dict(type='GN', num_groups=8, requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch='mini',
        num_kv_heads=(1, 2, 4, 8),
        out_indices=(1, 2, 3),
    ),
    neck=dict(
        _delete_=True,
        type='FPN',
        in_channels=[64, 128, 256],
        out_channels=64,
        num_outs=3,
        norm_cfg=norm_cfg,
    ),
    bbox_head=dict(
        in_channels=64,
        stacked_convs=2,
        feat_channels=64,
        norm_cfg=norm_cfg,
        anchor_generator=dict(octave_base_scale=3, strides=[8, 16, 32]),
        loss_bbox=dict(_delete_=True, type='GIoULoss', loss_weight=2.0),
        reg_decoded_bbox=True,
    ),
)
