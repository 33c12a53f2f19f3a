import cv2
import numpy as np
import pytest
import torch

from deform_gqa.benchmark.core.errors import OptionError
from deform_gqa.benchmark.core.report import Report
from deform_gqa.benchmark.models import build, detector_inputs

TINY = ['--device', 'cpu', '--repeats', '2', '--min-time-s', '0.01']
SIZE = ['--sizes', '64x96']
RETINANET = 'configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'
MASK_RCNN = 'configs/quickstart/mask-rcnn_dat-gqa-mini_fpn_shapes.py'
PER_QUERY = (
    'projects/multiview_deform_attn/configs/'
    'retinanet_dat-gqa-mini-per-query_fpn_shapes.py'
)
STOCK = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'


def run(tool, tmp_path, *argv):
    out = tmp_path / 'out'
    assert tool.main(['detector', *argv, *TINY, '--out', str(out)]) == 0
    return Report.load(out / 'detector.json')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('no.py', "config file 'no.py' does not exist"),
        ('configs/_base_/default_runtime.py', 'has no model'),
        (f'{RETINANET} --objects 0', '--objects: must be positive, got 0'),
        (f'{RETINANET} --images no.png', "--images 'no.png' does not exist"),
        (f'{RETINANET} --images configs', '--images configs: no image found'),
        (f'{RETINANET} --images configs --sizes 8x8', '--sizes is for noise'),
        (f'{RETINANET} --images configs --directions train', 'needs noise images'),
        (f'{STOCK} --kv-heads 1', '--kv-heads 1: the model has no DAT backbone'),
        (f'{RETINANET} --directions forward', "--directions: unknown 'forward'"),
    ],
)
def test_wrong_options(benchmark_tool, capsys, options, message):
    assert benchmark_tool.main(['detector', *options.split(), *TINY]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert message in err.splitlines()[-1]


def test_unsupported_backend_of_a_project(benchmark_tool, tmp_path):
    """Its op says so before a call fails."""
    argv = [PER_QUERY, *SIZE, '--backends', 'triton', '--directions', 'predict']
    [row] = run(benchmark_tool, tmp_path, *argv).rows
    assert row.status == 'unsupported'
    assert 'Triton kernels run on CUDA devices' in row.reason


def test_ours(benchmark_tool, tmp_path):
    pytest.importorskip('matplotlib')
    argv = [RETINANET, MASK_RCNN, *SIZE, '--backends', 'naive', 'torch']
    report = run(benchmark_tool, tmp_path, *argv)
    assert {row.status for row in report.rows} == {'ok'}
    directions = ['preprocess', 'predict', 'train']
    assert len(report.rows) == 2 * 2 * len(directions)
    assert report.options['directions'] == directions
    for row in report.rows:
        assert (row.work['flops'] > 0) == (row.direction != 'preprocess')
    case = report.cases[0]
    assert case['detector'] == 'retinanet_dat-gqa-mini_fpn_shapes'
    assert (case['kv heads'], case['image']) == ('1 2 4 8 of 2 4 8 16', '64x96')
    text = (tmp_path / 'out' / 'detector.md').read_text()
    assert 'With untrained weights post-processing has few detections' in text
    assert (tmp_path / 'out' / 'detector.png').exists()


def test_stock_config_with_a_checkpoint(benchmark_tool, tmp_path):
    cfg = build.load_config(STOCK, {})
    model = build.build_model(cfg.model, torch.device('cpu'), None)
    checkpoint = tmp_path / 'model.pth'
    torch.save(model.state_dict(), checkpoint)
    argv = [STOCK, *SIZE, '--batch-sizes', '2', '--checkpoint', str(checkpoint)]
    report = run(benchmark_tool, tmp_path, *argv)
    assert {row.backend for row in report.rows} == {'plain'}
    assert {row.work['images'] for row in report.rows} == {2}


def test_images_of_a_folder(benchmark_tool, tmp_path):
    images = tmp_path / 'images'
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for name in ('a.png', 'b.jpg'):
        cv2.imwrite(str(images / name), noise)
    (images / 'notes.txt').write_text('no image')
    report = run(benchmark_tool, tmp_path, RETINANET, '--images', str(images))
    assert report.options['directions'] == ['preprocess', 'predict']
    # the pipeline enlarges to a side of 192
    assert report.cases[0]['image'] == '2 files, up to 144x192'


def test_size_of_the_pipeline():
    assert detector_inputs.config_size(build.load_config(STOCK, {})) == (800, 1333)
    assert detector_inputs.config_size({}) == detector_inputs.DEFAULT_SIZE
    wrapped = {'dataset': {'pipeline': [dict(type='Resize', scale=(320, 240))]}}
    cfg = {'test_dataloader': {'dataset': wrapped}}
    assert detector_inputs.config_size(cfg) == (240, 320)


def test_synthetic_objects():
    batch = detector_inputs.random_batch((30, 50), 2, 5, classes=3, with_masks=True)
    assert [tuple(image.shape) for image in batch['inputs']] == [(3, 30, 50)] * 2
    for sample in batch['data_samples']:
        instances = sample.gt_instances
        boxes = instances.bboxes
        assert boxes.shape == (5, 4)
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([50, 30, 50, 30])).all()
        assert instances.labels.max() < 3
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert (torch.from_numpy(instances.masks.areas) >= areas.floor()).all()


def test_a_model_without_classes():
    with pytest.raises(OptionError, match='holds no num_classes'):
        detector_inputs.count_classes({'type': 'RPN'})
