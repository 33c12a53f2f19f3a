"""Detection by windows, with a detector that finds every bright rectangle exactly."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from deform_gqa.engine.slicing import detect_in_slices, slice_windows

SIDE, OVERLAP = 64, 24
# In an image of 150 x 200: inside a window, on a seam, on a corner where four windows
# meet, at the image's border, wider than the overlap and on a seam.
RECTANGLES = [
    (5, 6, 15, 20),
    (55, 10, 75, 24),
    (34, 34, 50, 54),
    (185, 130, 200, 150),
    (70, 100, 125, 110),
]


def image_with(rectangles) -> np.ndarray:
    image = np.zeros((150, 200, 3), np.uint8)
    for x1, y1, x2, y2 in rectangles:
        image[y1:y2, x1:x2] = 255
    return image


def detect(crops) -> list[InstanceData]:
    """Connected bright pixels; large ones score higher."""
    found = []
    for crop in crops:
        count, map_, stats, _ = cv2.connectedComponentsWithStats(crop[..., 0])
        stats = torch.from_numpy(stats[1:]).float()
        boxes = torch.cat([stats[:, :2], stats[:, :2] + stats[:, 2:4]], dim=1)
        masks = torch.from_numpy(np.stack([map_ == i for i in range(count)])[1:])
        found.append(
            InstanceData(
                bboxes=boxes,
                scores=stats[:, 4] / 1e4,
                labels=torch.zeros(len(boxes), dtype=torch.long),
                masks=masks,
            )
        )
    return found


def as_set(boxes) -> set:
    return {tuple(box) for box in boxes.int().tolist()}


def test_objects_on_seams_are_found_once_and_whole():
    image = image_with(RECTANGLES[:4])
    whole = detect([image])[0]
    merged = detect_in_slices(image, detect, SIDE, OVERLAP)
    assert len(slice_windows(image.shape[:2], SIDE, OVERLAP)) > 9
    assert len(merged) == len(whole) == 4
    assert as_set(merged.bboxes) == as_set(whole.bboxes) == set(RECTANGLES[:4])
    assert merged.masks.shape == (4, 150, 200)
    for box, mask in zip(merged.bboxes.int().tolist(), merged.masks, strict=True):
        np.testing.assert_array_equal(mask.numpy(), image_with([box])[..., 0] > 0)


def test_an_object_wider_than_the_overlap_stays():
    """No window holds it whole; its largest parts are merged."""
    merged = detect_in_slices(image_with(RECTANGLES[4:]), detect, SIDE, OVERLAP)
    assert 1 <= len(merged) <= 2
    assert (merged.bboxes[0, 2] - merged.bboxes[0, 0]) >= 40


def test_labels_are_kept_apart():
    def two_classes(crops):
        found = detect(crops)
        both = [InstanceData.cat([x, x]) for x in found]
        for x in both:
            x.labels[len(x) // 2 :] = 1
        return both

    merged = detect_in_slices(image_with(RECTANGLES[1:2]), two_classes, SIDE, OVERLAP)
    assert merged.labels.tolist() == [0, 1]


def test_an_image_without_objects():
    merged = detect_in_slices(image_with([]), detect, SIDE, OVERLAP)
    assert len(merged) == 0
    assert merged.masks.shape == (0, 150, 200)


def test_without_masks():
    def boxes_only(crops):
        found = detect(crops)
        for x in found:
            x.pop('masks')
        return found

    merged = detect_in_slices(image_with(RECTANGLES[:4]), boxes_only, SIDE, OVERLAP)
    assert 'masks' not in merged
    assert len(merged) == 4


@pytest.mark.parametrize('size', [(150, 200), (64, 64), (10, 65), (63, 300)])
@pytest.mark.parametrize('overlap', [0, 24, 63])
def test_windows_cover_the_image(size, overlap):
    covered = np.zeros(size, int)
    for x1, y1, x2, y2 in slice_windows(size, SIDE, overlap):
        assert 0 <= x1 < x2 <= size[1] and 0 <= y1 < y2 <= size[0]
        assert x2 - x1 == min(SIDE, size[1]) and y2 - y1 == min(SIDE, size[0])
        covered[y1:y2, x1:x2] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(side=0), ValueError, 'side must be at least 1, got 0'),
        (dict(side=6.5), TypeError, 'side must be an integer, got 6.5'),
        (dict(overlap=-1), ValueError, 'overlap must be at least 0, got -1'),
        (dict(overlap=64), ValueError, 'overlap=64 and side=64'),
        (dict(iou_threshold=0), ValueError, r'iou_threshold must be in \(0, 1\]'),
        (dict(iou_threshold='a'), TypeError, 'iou_threshold must be a number'),
    ],
)
def test_bad_options(options, error, message):
    options = dict(dict(side=SIDE, overlap=OVERLAP), **options)
    with pytest.raises(error, match=message):
        detect_in_slices(image_with([]), detect, **options)
