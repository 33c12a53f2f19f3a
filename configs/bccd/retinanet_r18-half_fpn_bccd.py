"""The baseline: the same detector and schedule with ResNet-18 at half width."""

_base_ = './retinanet_dat-gqa-mini_fpn_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        base_channels=32,
        num_stages=4,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        style='pytorch',
    ),
)
