"""Mask R-CNN with DAT-T++ and half of its key/value heads, 12 epochs."""

_base_ = '../dat/mask-rcnn_dat-t-pp_fpn_1x_coco.py'

model = dict(backbone=dict(num_kv_heads=(1, 2, 4, 8)))
