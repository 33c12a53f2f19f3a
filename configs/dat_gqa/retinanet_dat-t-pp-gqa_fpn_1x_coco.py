"""RetinaNet with DAT-T++ and grouped-query heads: half the kv heads of its base."""

_base_ = '../dat/retinanet_dat-t-pp_fpn_1x_coco.py'

model = dict(backbone=dict(num_kv_heads=(1, 2, 4, 8)))
