"""DINO with DAT-T++; multi-scale deformable attention is this package's too."""

_base_ = '../swap_attention/dino-4scale_r50_8xb2-12e_coco.py'

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
