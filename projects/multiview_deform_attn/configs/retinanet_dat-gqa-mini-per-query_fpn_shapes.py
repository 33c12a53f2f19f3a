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
        # the arch 'mini' with other letters in its third stage
        arch=dict(
            _delete_=True,
            embed_dims=(32, 64, 128, 256),
            depths=(2, 2, 2, 2),
            num_heads=(2, 4, 8, 16),
            block_types=('ND', 'ND', 'NQ', 'DD'),
            offset_groups=(1, 2, 4, 8),
            table_sizes=(64, 32, 16, 8),
        ),
        attention=dict(
            Q=dict(type='PerQueryDeformableAttention', num_points=8, offset_groups=2)
        ),
    )
)
# Offsets are in pixels of the map, while the shared offsets of DAT are in halves of it,
# so they need larger steps to get as far. Base offsets are positions: no weight decay.
block = 'backbone.stages.2.attns.1'
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            f'{block}.base_offset': dict(lr_mult=10.0, decay_mult=0.0),
            f'{block}.conv_offset.3': dict(lr_mult=10.0),
        }
    )
)
