"""The multi-head detector that is converted: as many kv heads as query heads."""

_base_ = '../../../configs/bccd/retinanet_dat-gqa-mini_fpn_bccd.py'

model = dict(backbone=dict(num_kv_heads=None))
# One validation, at the end: no row of the experiment picks an epoch.
train_cfg = dict(val_interval=24)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
