"""COCO's metric, computed by faster-coco-eval where that is installed.

Not imported with the room, as mmdet's evaluation takes seconds: configs name this
module in ``custom_imports``.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator

from mmdet.evaluation.metrics import CocoMetric, coco_metric
from mmdet.registry import METRICS
from mmengine.logging import print_log

__all__ = ['AutoCocoMetric']

_PACKAGE = 'faster_coco_eval'


@functools.cache
def _evaluator() -> type:
    """The class that compares detections with the ground truth; named in the log."""
    if importlib.util.find_spec(_PACKAGE) is None:
        print_log(
            f'AutoCocoMetric uses pycocotools: {_PACKAGE}, which is faster, is not '
            'installed',
            logger='current',
        )
        return coco_metric.COCOeval
    return importlib.import_module(_PACKAGE).COCOeval_faster


@contextlib.contextmanager
def _evaluating_with(cls: type) -> Iterator[None]:
    """mmdet's metric looks its evaluator up in its module, at each call."""
    before = coco_metric.COCOeval
    coco_metric.COCOeval = cls
    try:
        yield
    finally:
        coco_metric.COCOeval = before


@METRICS.register_module()
class AutoCocoMetric(CocoMetric):
    """mmdet's CocoMetric, with the same options and numbers, faster where it can be.

    With the package ``faster-coco-eval`` detections are matched in C++; without it, by
    pycocotools, as in mmdet. (mmdet's own FasterCocoMetric fails where that package is
    missing.)
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        with _evaluating_with(_evaluator()):
            return super().compute_metrics(results)
