"""DINO with the fused attention of this package in encoder and decoder."""

_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    '../_base_/default_runtime.py',
]

model = dict(
    _delete_=True,
    type='swap_attention',
    model={{_base_.model}},
    rules=[dict(pattern='encoder|decoder', type='MSDeformAttn')],
)
