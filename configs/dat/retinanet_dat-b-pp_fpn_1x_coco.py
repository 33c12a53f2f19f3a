"""RetinaNet with DAT-B++, 12 epochs."""

_base_ = './retinanet_dat-t-pp_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='b++', drop_path_rate=0.2),
    neck=dict(in_channels=[256, 512, 1024]),
)
