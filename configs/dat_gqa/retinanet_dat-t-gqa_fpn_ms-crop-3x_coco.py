"""RetinaNet with DAT-T and a third of its key/value heads, 36 epochs."""

_base_ = '../dat/retinanet_dat-t_fpn_ms-crop-3x_coco.py'

model = dict(backbone=dict(num_kv_heads=(1, 2, 4, 8)))
