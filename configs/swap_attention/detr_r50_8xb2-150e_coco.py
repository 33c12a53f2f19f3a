"""DETR with two key/value heads for the eight query heads of all its attention."""

_base_ = [
    'mmdet::detr/detr_r50_8xb2-150e_coco.py',
    '../_base_/default_runtime.py',
]

model = dict(
    _delete_=True,
    type='swap_attention',
    model={{_base_.model}},
    rules=[
        dict(
            pattern='encoder|decoder',
            type='GroupedMultiheadAttention',
            num_kv_heads=2,
            keep_weights=False,  # they are drawn a moment before
        )
    ],
)
