"""RTMDet with DAT-T++ and half of its key/value heads."""

_base_ = '../dat/rtmdet-s_dat-t-pp_8xb16-100e_coco.py'

model = dict(backbone=dict(num_kv_heads=(1, 2, 4, 8)))
