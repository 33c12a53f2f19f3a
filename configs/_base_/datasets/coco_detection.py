"""COCO, evaluated by faster-coco-eval where that is installed."""

_base_ = 'mmdet::_base_/datasets/coco_detection.py'

val_evaluator = dict(type='AutoCocoMetric')
test_evaluator = dict(type='AutoCocoMetric')
