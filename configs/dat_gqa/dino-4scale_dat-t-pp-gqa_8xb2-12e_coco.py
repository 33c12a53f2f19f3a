"""DINO with DAT-T++ and half of its key/value heads."""

_base_ = '../dat/dino-4scale_dat-t-pp_8xb2-12e_coco.py'

model = dict(model=dict(backbone=dict(num_kv_heads=(1, 2, 4, 8))))
