"""Deformable DETR with the fused attention of this package in encoder and decoder."""

_base_ = [
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    '../_base_/default_runtime.py',
]

model = dict(
    _delete_=True,
    type='swap_attention',
    model={{_base_.model}},
    rules=[dict(pattern='encoder|decoder', type='MSDeformAttn')],
)
