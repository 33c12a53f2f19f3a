"""Pictures of sampled points: every panel, mark and place."""

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

from deform_gqa.models import DeformableGQA
from deform_gqa.visualization import (
    draw_attention,
    draw_detections,
    figure_to_image,
    record_attention,
)

IMAGE = np.full((40, 60, 3), 200, np.uint8)


@pytest.fixture(scope='module')
def record():
    torch.manual_seed(0)
    attn = DeformableGQA(16, 4, offset_groups=2, stride=2, position_bias=None)
    model = nn.ModuleDict({'attn': attn}).eval()
    with record_attention(model) as records:
        attn(torch.randn(2, 16, 8, 12))
    return records['attn']


def scatters(figure):
    """The scattered points of each panel that shows something."""
    return [
        [mark.get_offsets() for mark in axes.collections if len(mark.get_offsets())]
        for axes in figure.axes
        if axes.images
    ]


def test_a_row_of_groups_and_one_for_each_query(record):
    figure = draw_attention(IMAGE, record, [0, 95], index=1)
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    heads = [f'head {i}' for i in range(4)]
    assert titles == ['offset group 0', 'offset group 1', *heads, *heads]
    image = figure_to_image(figure)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.std() > 10


def test_marks_are_where_the_points_are(record):
    figure = draw_attention(IMAGE, record, [95], index=1, heads=[3], area=(0.5, 0.8))
    scale = np.array([60 / 0.5, 40 / 0.8])
    panels = scatters(figure)
    np.testing.assert_allclose(panels[0][0], record.reference.numpy() * scale)
    points, weights = record.samples(1, 95)
    order = weights[3].argsort()
    samples, query = panels[2]
    np.testing.assert_allclose(samples, points[3][order].detach() * scale, rtol=1e-5)
    np.testing.assert_allclose(query[0], record.query_points[1, 95] * scale, rtol=1e-6)
    arrows = figure.axes[0].collections[1]
    moved = (record.sampled[1, 0] - record.reference).detach().numpy() * scale
    np.testing.assert_allclose(arrows.U, moved[:, 0], rtol=1e-4, atol=1e-4)


def test_weights_of_all_heads_have_one_scale(record):
    figure = draw_attention(IMAGE, record, [7])
    _, weights = record.samples(0, 7)
    for axes in figure.axes:
        if axes.get_title().startswith('head'):
            assert axes.collections[0].norm.vmax == pytest.approx(weights.max().item())
            assert axes.collections[0].norm.vmin == 0


def detections(boxes, scores, **metainfo):
    result = DetDataSample(metainfo=dict(ori_shape=(40, 60), **metainfo))
    result.pred_instances = InstanceData(
        bboxes=torch.tensor(boxes).reshape(-1, 4), scores=torch.tensor(scores)
    )
    return result


@pytest.mark.parametrize(
    ('boxes', 'scores', 'expected'),
    [
        # The batch is padded to 62 x 110.
        ([[0.0, 0, 4, 4], [30.0, 20, 34, 24]], [0.3, 0.9], [27, 0]),
        ([[0.0, 0, 4, 4], [0.0, 0, 5, 5]], [0.3, 0.9], [0]),  # once each
        ([], [], [27]),
        ([[50.0, 30, 90, 70]], [0.5], [66]),  # its centre is the image's corner
    ],
)
def test_queries_of_detections(record, monkeypatch, boxes, scores, expected):
    drawn = []
    monkeypatch.setattr(
        'deform_gqa.visualization.detections.draw_attention',
        lambda image, record, queries, **options: drawn.append((queries, options)),
    )
    result = detections(boxes, scores, img_shape=(40, 60), batch_input_shape=(62, 110))
    draw_detections(IMAGE, record, result)
    [(queries, options)] = drawn
    assert options['area'] == (60 / 110, 40 / 62)
    assert queries == expected


def test_bad_arguments(record):
    with pytest.raises(ValueError, match='queries must name at least one'):
        draw_attention(IMAGE, record, [])
    with pytest.raises(ValueError, match='queries must be from 0 to 95, got 96'):
        draw_attention(IMAGE, record, [96])
    with pytest.raises(ValueError, match='heads must be from 0 to 3, got 4'):
        draw_attention(IMAGE, record, [0], heads=[4])
    result = detections([], [], img_shape=(40, 60))
    with pytest.raises(ValueError, match='image of 60 x 40, got 61,2'):
        draw_detections(IMAGE, record, result, [(61, 2)])
