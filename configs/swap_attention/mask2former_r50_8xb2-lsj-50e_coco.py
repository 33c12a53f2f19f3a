"""Mask2Former: fused multi-scale attention of the pixels, grouped queries of the masks.

The pixel decoder's attention is that of Deformable DETR, the decoder's is multi-head.
"""

_base_ = [
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    '../_base_/default_runtime.py',
]

model = dict(
    _delete_=True,
    type='swap_attention',
    model={{_base_.model}},
    rules=[
        dict(pattern='pixel_decoder', type='MSDeformAttn'),
        dict(
            pattern='transformer_decoder',
            type='GroupedMultiheadAttention',
            num_kv_heads=2,
            keep_weights=False,  # they are drawn a moment before
        ),
    ],
)
