"""RetinaNet with DAT-B and half of its key/value heads, 36 epochs."""

_base_ = '../dat/retinanet_dat-b_fpn_ms-crop-3x_coco.py'

model = dict(backbone=dict(num_kv_heads=(2, 4, 8, 16)))
