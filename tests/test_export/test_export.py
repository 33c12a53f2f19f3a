"""Exported graphs compute what their models compute, at any size and batch."""

import onnx
import pytest
import torch
from export_models import ARCH, build, retinanet_config, rtmdet_config

from deform_gqa.export import (
    BackboneGraph,
    DetectorGraph,
    trace,
    write_onnx,
    write_package,
    write_program,
)
from deform_gqa.export.graphs import least_side
from deform_gqa.export.verify import (
    Difference,
    compare_detections,
    compare_maps,
    detect,
    medians_ms,
    onnx_runner,
    package_runner,
    program_runner,
    random_images,
)
from deform_gqa.models import DAT

SIZES = ((64, 64), (96, 160), (160, 128))


def operators(path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def assert_within(differences):
    assert all(difference.is_within for difference in differences), differences


def assert_detects(detector, path):
    run = onnx_runner(path, threads=1)
    for batch, size in zip((1, 2, 3), SIZES, strict=True):
        images = random_images(size, batch, pixels=True)
        assert min(len(found.bboxes) for found in detect(detector, images)) >= 5
        assert_within(compare_detections(detector, run, images))


def test_retinanet_by_gather(tmp_path):
    detector = build(retinanet_config())
    graph = DetectorGraph(detector)
    path = tmp_path / 'retinanet.onnx'
    write_onnx(trace(graph), path, graph.output_names)
    assert_detects(detector, path)
    assert 'NonMaxSuppression' in operators(path)
    assert 'GridSample' not in operators(path)
    images = torch.full((1, 3, 64, 64), 123.0)
    boxes, scores, labels = onnx_runner(path)(images)
    empty = labels < 0
    assert (scores[empty] == 0).all()
    assert boxes.shape == (1, 20, 4)


def test_rtmdet_by_grid_sample(tmp_path):
    detector = build(rtmdet_config())
    graph = DetectorGraph(detector)
    path = tmp_path / 'rtmdet.onnx'
    program = trace(graph, sampling='grid_sample')
    write_onnx(program, path, graph.output_names, opset=20)
    assert_detects(detector, path)
    assert 'GridSample' in operators(path)
    [imported] = (x for x in onnx.load(path).opset_import if x.domain == '')
    assert imported.version == 20


@pytest.fixture(scope='module')
def backbone():
    torch.manual_seed(0)
    arch = dict(ARCH, block_types=('D', 'S', 'N', 'X'))
    return DAT(arch, out_indices=(0, 1, 2)).eval()


def test_program_of_a_backbone(backbone, tmp_path):
    graph = BackboneGraph(backbone)
    path = tmp_path / 'backbone.pt2'
    write_program(trace(graph), path)
    program = torch.export.load(path)
    names = {str(node.target) for node in program.graph.nodes}
    assert not any('deform_gqa' in name for name in names)
    for batch, size in zip((1, 2, 3), ((96, 96), (128, 160), (192, 96)), strict=True):
        images = random_images(size, batch)
        assert_within(compare_maps(backbone, program_runner(program), images))


def test_compiled_package_of_a_backbone(tmp_path):
    """Of convolutions only: compiling a block of attention takes minutes."""
    torch.manual_seed(0)
    arch = dict(ARCH, block_types=('X', 'N', 'N', 'D'), lpu=(False,) * 4)
    arch.update(dwconv_mlp=(False,) * 4)
    backbone = DAT(arch, out_indices=(0,))
    path = tmp_path / 'package.pt2'
    program = trace(BackboneGraph(backbone), fixed_size=(64, 96))
    write_package(program, path)
    images = random_images((64, 96))
    assert_within(compare_maps(backbone, package_runner(path), images))


def test_least_side_is_that_of_the_largest_window(backbone):
    assert least_side(backbone) == 64  # windows of 7 on the map at stride 8
    assert least_side(torch.nn.Conv2d(3, 3, 1)) == 32


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(sampling='nearest'), "sampling must be one of .*, got 'nearest'"),
        (dict(fixed_size=(96, 100)), r'multiples of 32 .* got \(96, 100\)'),
        (dict(fixed_size=(32, 96)), r'at least 64 pixels .* got \(32, 96\)'),
    ],
)
def test_trace_refuses(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        trace(BackboneGraph(backbone), **options)


@pytest.mark.parametrize('opset', [11, 17, 99])
def test_an_opset_that_cannot(opset, tmp_path):
    with pytest.raises(ValueError, match=f'opset must be from 18 .* got {opset}'):
        write_onnx(None, tmp_path / 'x.onnx', ['x'], opset)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_torch_does_not_write(tmp_path, monkeypatch):
    """The exporter falls back to its own opset with no more than a warning."""

    class Program:
        model = type('Model', (), dict(opset_imports={'': 18}))

    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: Program)
    with pytest.raises(ValueError, match='in opset 19, it wrote opset 18'):
        write_onnx(None, tmp_path / 'x.onnx', ['x'], opset=19)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(nms=dict(type='soft_nms')), "test_cfg.nms must be .* 'soft_nms'"),
        (dict(nms_pre=-1), 'test_cfg.nms_pre must be at least 1 .* got -1'),
        (dict(max_per_img=0), 'test_cfg.max_per_img must be at least 1 .* got 0'),
    ],
)
def test_post_processing_without_a_graph(change, message):
    detector = build(retinanet_config())
    detector.bbox_head.test_cfg.update(change)
    with pytest.raises(ValueError, match=message):
        DetectorGraph(detector)


def test_detectors_without_a_graph():
    with pytest.raises(ValueError, match='Linear with the head NoneType cannot'):
        DetectorGraph(torch.nn.Linear(1, 1))
    detector = build(retinanet_config())
    detector.bbox_head.use_sigmoid_cls = False
    with pytest.raises(ValueError, match=r'use_sigmoid must be True .* got False'):
        DetectorGraph(detector)


def test_differences_are_found():
    detector = build(retinanet_config())
    graph = DetectorGraph(detector)
    images = random_images((64, 96), 2, pixels=True)
    assert_within(compare_detections(detector, graph, images))

    def moved(images):
        boxes, scores, labels = graph(images)
        return boxes + 0.5, scores, labels

    def fewer(images):
        boxes, scores, labels = graph(images)
        labels[:, 0] = -1
        return boxes, scores, labels

    difference, _ = compare_detections(detector, moved, images)
    assert not difference.is_within
    assert difference.largest == pytest.approx(0.5, abs=1e-3)
    difference, _ = compare_detections(detector, fewer, images)
    assert difference.unmatched >= 2
    assert '64 x 96, boxes: differs by' in str(difference)
    assert not Difference((1, 1), 'map0', float('nan'), 1e-4).is_within


def test_a_file_that_onnxruntime_cannot_load(tmp_path):
    path = tmp_path / 'broken.onnx'
    path.write_bytes(b'no graph')
    with pytest.raises(ValueError, match=r'onnxruntime cannot load .*broken\.onnx'):
        onnx_runner(path)


def test_medians_are_of_all_calls_but_the_first():
    calls = []
    times = medians_ms(dict(a=lambda: calls.append('a')), repeats=3)
    assert calls == ['a'] * 4
    assert times['a'] >= 0


def test_programs_hold_no_op_of_the_package(backbone):
    graph = BackboneGraph(backbone)
    backends = {m.backend for m in graph.modules() if hasattr(m, 'backend')}
    assert backends == {'naive'}
    assert {m.backend for m in backbone.modules() if hasattr(m, 'backend')} == {'auto'}
