"""RetinaNet with DAT-T++, 12 epochs."""

_base_ = [
    '../_base_/models/retinanet_dat_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/dat_1x.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/default_runtime.py',
]

# Half of the rate of the other detectors, as published.
optim_wrapper = dict(optimizer=dict(lr=5e-5))
