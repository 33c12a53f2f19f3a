"""RetinaNet with a Swin backbone, whose windows attend with torch's fused attention.

All heads keep keys and values of their own (``num_kv_heads`` is not given), so that the
pretrained weights of the backbone load.
"""

_base_ = [
    'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    '../_base_/default_runtime.py',
]

model = dict(
    _delete_=True,
    type='swap_attention',
    model={{_base_.model}},
    rules=[dict(pattern='backbone', type='GroupedWindowMSA')],
)
