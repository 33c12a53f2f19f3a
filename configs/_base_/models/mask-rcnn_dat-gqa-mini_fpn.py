"""Mask R-CNN with a DAT-GQA of 2 million parameters, for small images on CPUs."""

_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

norm_cfg = dict(type='GN', num_groups=8, requires_grad=True)
roi_extractor = dict(
    roi_layer=dict(sampling_ratio=2),
    out_channels=64,
    finest_scale=28,  # objects are half as large as in COCO
)
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch='mini',
        num_kv_heads=(1, 2, 4, 8),
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        bbox_head=dict(in_channels=64, fc_out_channels=256, reg_class_agnostic=True),
        mask_roi_extractor=roi_extractor,
        mask_head=dict(
            num_convs=2, in_channels=64, conv_out_channels=64, norm_cfg=norm_cfg
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=1000, max_per_img=300),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(max_per_img=300)),
)
