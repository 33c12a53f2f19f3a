"""Deformable DETR with DAT-T++ and half of its key/value heads."""

_base_ = '../dat/deformable-detr_dat-t-pp_16xb2-50e_coco.py'

model = dict(model=dict(backbone=dict(num_kv_heads=(1, 2, 4, 8))))
