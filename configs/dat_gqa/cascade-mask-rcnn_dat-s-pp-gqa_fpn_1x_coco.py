"""Cascade Mask R-CNN with DAT-S++ and a third of its key/value heads, 12 epochs."""

_base_ = '../dat/cascade-mask-rcnn_dat-s-pp_fpn_1x_coco.py'

model = dict(backbone=dict(num_kv_heads=(1, 2, 4, 8)))
