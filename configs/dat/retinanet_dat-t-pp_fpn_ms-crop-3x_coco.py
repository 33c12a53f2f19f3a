"""RetinaNet with DAT-T++, 36 epochs."""

_base_ = [
    '../_base_/models/retinanet_dat_fpn.py',
    '../_base_/datasets/coco_detection_ms-crop.py',
    '../_base_/schedules/dat_3x.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(drop_path_rate=0.2))
# Half of the rate of the other detectors, as published.
optim_wrapper = dict(optimizer=dict(lr=5e-5))
