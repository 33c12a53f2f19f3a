"""RetinaNet with a small DAT-GQA on BCCD, 6 epochs from scratch.

Rows of the table have another attention in its D blocks.
"""

_base_ = '../../../configs/bccd/retinanet_dat-gqa-mini_fpn_bccd.py'

max_epochs = 6
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs + 1)  # tested apart
