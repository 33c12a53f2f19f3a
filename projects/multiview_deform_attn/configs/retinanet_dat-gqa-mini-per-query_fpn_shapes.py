"""The quickstart detector with per-query samples in its third stage.

Letter Q stands for this project's attention: every query samples points of its own,
where the deformable blocks (letter D) share theirs.
"""

_base_ = '../../../configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'

custom_imports = dict(
    imports=[
        'deform_gqa.models',
        'deform_gqa.engine',
        'projects.multiview_deform_attn.multiview_deform_attn',
    ],
    allow_failed_imports=False,
)
model = dict(
    backbone=dict(
        arch=dict(block_types=('ND', 'ND', 'NQ', 'DD')),
        attention=dict(
            Q=dict(type='PerQueryDeformableAttention', num_points=8, offset_groups=2)
        ),
    )
)
# The offsets' starting points are places, which should not decay to zero.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'base_offset': dict(decay_mult=0.0)})
)
