"""The quickstart detector with its deformable attention swapped for pyramid attention.

Any registered module with the block interface of ``deform_gqa.models`` can stand here;
its class gets dim, num_heads, num_kv_heads and its own options.
"""

_base_ = '../quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'

model = dict(backbone=dict(attention=dict(D=dict(type='PyramidAttention', sr_ratio=2))))
