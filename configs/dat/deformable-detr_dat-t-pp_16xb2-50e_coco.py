"""Deformable DETR with DAT-T++; its own attention is this package's too."""

_base_ = '../swap_attention/deformable-detr_r50_16xb2-50e_coco.py'

model = dict(
    model=dict(
        backbone=dict(
            _delete_=True,
            type='DAT',
            arch='t++',
            out_indices=(1, 2, 3),
            drop_path_rate=0.2,
        ),
        neck=dict(in_channels=[128, 256, 512]),
    )
)
val_evaluator = dict(type='AutoCocoMetric')
test_evaluator = dict(type='AutoCocoMetric')
