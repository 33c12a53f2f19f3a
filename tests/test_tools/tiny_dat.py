# The tiny detector with deformable attention in two stages of its backbone.
_base_ = 'tiny_retinanet.py'
custom_imports = dict(
    imports=['deform_gqa.models', 'deform_gqa.engine'], allow_failed_imports=False
)
model = dict(
    backbone=dict(
        _delete_=True,
        type='DAT',
        arch=dict(
            embed_dims=(4, 8, 16, 32),
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 2, 4),
            block_types=('N', 'N', 'D', 'D'),
            offset_groups=(1, 1, 1, 2),
            table_sizes=(16, 8, 4, 2),
            neighborhood_sizes=(3, 3, 3, 3),
        ),
        out_indices=(0, 1, 2, 3),
    ),
)
custom_hooks = [dict(type='AttentionVisualizationHook', num_images=1)]
