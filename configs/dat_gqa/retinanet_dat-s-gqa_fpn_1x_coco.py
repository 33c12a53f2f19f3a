"""RetinaNet with DAT-S and a third of its key/value heads, 12 epochs."""

_base_ = '../dat/retinanet_dat-s_fpn_1x_coco.py'

model = dict(backbone=dict(num_kv_heads=(1, 2, 4, 8)))
