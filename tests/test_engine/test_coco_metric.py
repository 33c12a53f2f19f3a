"""AutoCocoMetric gives mmdet's numbers, with faster-coco-eval and without."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from faster_coco_eval import COCOeval_faster
from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import METRICS
from mmdet.structures.mask import encode_mask_results

from deform_gqa.engine import coco_metric
from deform_gqa.engine.coco_metric import AutoCocoMetric

CLASSES = ('a', 'b', 'c')
WIDTH, HEIGHT, IMAGES, OBJECTS = 160, 120, 12, 6


def draw_mask(box):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    x1, y1, x2, y2 = box.round().astype(int)
    mask[y1:y2, x1:x2] = True
    return mask


@pytest.fixture(scope='module')
def scene(tmp_path_factory):
    """A ground truth with crowds and all sizes, and detections around its boxes."""
    rng = np.random.default_rng(0)
    annotations, predictions = [], []
    for image in range(IMAGES):
        sides = rng.uniform(6, 100, (OBJECTS, 2))
        corners = rng.uniform(0, 1, (OBJECTS, 2)) * ((WIDTH, HEIGHT) - sides)
        boxes = np.concatenate([corners, corners + sides], axis=1)
        labels = rng.integers(0, len(CLASSES), OBJECTS)
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image,
                    category_id=int(label) + 1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=int(rng.random() < 0.1),
                    segmentation=[[x1, y1, x2, y1, x2, y2, x1, y2]],
                )
            )
        found = np.repeat(boxes, 2, axis=0)
        found = (found + rng.normal(0, 4, found.shape)).clip(0, (WIDTH, HEIGHT) * 2)
        masks = [draw_mask(box) for box in found]
        predictions.append(
            dict(
                bboxes=torch.tensor(found, dtype=torch.float32),
                scores=torch.tensor(rng.random(len(found)), dtype=torch.float32),
                labels=torch.tensor(np.repeat(labels, 2)),
                masks=encode_mask_results(masks),
            )
        )
    images = [
        dict(id=image, width=WIDTH, height=HEIGHT, file_name='')
        for image in range(IMAGES)
    ]
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)]
    path = tmp_path_factory.mktemp('coco') / 'annotations.json'
    content = dict(images=images, annotations=annotations, categories=categories)
    path.write_text(json.dumps(content))
    return str(path), predictions


def evaluate(metric_class, scene, **options):
    path, predictions = scene
    metric = metric_class(ann_file=path, metric=['bbox', 'segm'], **options)
    metric.dataset_meta = dict(classes=CLASSES)
    samples = [
        dict(img_id=image, ori_shape=(HEIGHT, WIDTH), pred_instances=dict(prediction))
        for image, prediction in enumerate(predictions)
    ]
    metric.process({}, samples)
    return metric.evaluate(len(samples))


@pytest.fixture
def afresh():
    """The package is looked for again, before and after."""
    coco_metric._evaluator.cache_clear()
    yield
    coco_metric._evaluator.cache_clear()


def test_with_faster_coco_eval(scene, afresh):
    assert coco_metric._evaluator() is COCOeval_faster
    found = evaluate(AutoCocoMetric, scene, classwise=True)
    assert found == evaluate(CocoMetric, scene, classwise=True)
    assert 0.1 < found['coco/bbox_mAP'] < 0.9 and 0.1 < found['coco/segm_mAP'] < 0.9


@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
def test_numbers_before_they_are_rounded(scene, iou_type, tmp_path):
    path, predictions = scene
    metric = CocoMetric(ann_file=path)
    metric.cat_ids = [1, 2, 3]
    arrays = [
        {name: np.asarray(value) for name, value in prediction.items()}
        for prediction in predictions
    ]
    files = metric.results2json(
        [dict(image, img_id=index) for index, image in enumerate(arrays)],
        str(tmp_path / 'x'),
    )
    stats = []
    for evaluator in (COCOeval, COCOeval_faster):
        api = COCO(path)
        run = evaluator(api, api.loadRes(files[iou_type]), iou_type)
        run.params.maxDets = [100, 300, 1000]
        run.evaluate()
        run.accumulate()
        run.summarize()
        stats.append(np.asarray(run.stats)[:12])
    np.testing.assert_allclose(stats[1], stats[0], rtol=0, atol=1e-12)
    assert (stats[0] > 0).sum() >= 10


def test_without_faster_coco_eval(scene, afresh, monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name: None if name == 'faster_coco_eval' else find(name),
    )
    assert coco_metric._evaluator() is COCOeval
    assert evaluate(AutoCocoMetric, scene) == evaluate(CocoMetric, scene)


def test_mmdets_own_metric_is_left_as_it_was(scene, afresh):
    before = coco_metric.coco_metric.COCOeval
    evaluate(AutoCocoMetric, scene)
    assert coco_metric.coco_metric.COCOeval is before is COCOeval
    with pytest.raises(KeyError, match='is not in results'):
        evaluate(AutoCocoMetric, (scene[0], without_masks(scene[1])))
    assert coco_metric.coco_metric.COCOeval is before


def without_masks(predictions):
    return [
        {name: value for name, value in prediction.items() if name != 'masks'}
        for prediction in predictions
    ]


def test_registered():
    assert METRICS.get('AutoCocoMetric') is AutoCocoMetric
