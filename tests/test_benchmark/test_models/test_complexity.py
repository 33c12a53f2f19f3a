"""Parameters and FLOPs of detectors from their configs."""

import pytest
import torch
from metafiles import ROOT, metadata_of
from mmengine.config import Config
from torch import nn

from deform_gqa.benchmark.core.flops import count_flops
from deform_gqa.benchmark.models import complexity
from deform_gqa.benchmark.models.complexity import image_size, measure_complexity

QUICKSTART = 'configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'
SWAPPED = 'configs/swap_attention/deformable-detr_r50_16xb2-50e_coco.py'
SIZE = (64, 96)


@pytest.mark.parametrize(
    'path', [QUICKSTART, 'configs/dat_gqa/rtmdet-s_dat-t-pp-gqa_8xb16-100e_coco.py']
)
def test_what_the_metafiles_say(path):
    found = measure_complexity(Config.fromfile(ROOT / path))
    metadata = metadata_of(path)
    assert found.parameters == metadata['Parameters']
    assert found.multiply_adds == metadata['FLOPs']
    assert list(found.size) == metadata['Input Size']
    assert 0 < found.backbone_parameters < found.parameters


@pytest.mark.parametrize('path', [QUICKSTART, SWAPPED])
def test_the_same_number_without_computing(path, monkeypatch):
    """Sampling, and neighborhood and multi-scale attention are ops of this package."""
    cfg = Config.fromfile(ROOT / path)
    skipped = measure_complexity(cfg, SIZE)
    monkeypatch.setattr(complexity, 'count_flops', lambda call, _: count_flops(call))
    assert measure_complexity(cfg, SIZE) == skipped


def test_without_computing_the_outputs_are_zeros():
    conv = nn.Conv2d(3, 4, 3)
    x = torch.ones(1, 3, 5, 7)
    outs = []
    computed = count_flops(lambda: outs.append(conv(x)))
    assert computed == count_flops(lambda: outs.append(conv(x)), compute=False)
    assert outs[1].shape == outs[0].shape and outs[1].dtype == outs[0].dtype
    assert outs[0].any() and not outs[1].any()


def test_masks_of_a_cascade_are_those_of_the_detections():
    head = nn.Conv2d(2, 3, 1)
    extractor = nn.Module()
    extractor.out_channels = 2
    extractor.roi_layers = [nn.Module()]
    extractor.roi_layers[0].output_size = (4, 5)
    model = nn.Module()
    model.roi_head = nn.Module()
    model.roi_head.mask_head = nn.ModuleList([head, head])
    model.roi_head.mask_roi_extractor = [extractor, extractor]
    assert complexity._cascaded_masks(model) == 2 * 2 * (100 * 4 * 5) * 2 * 3
    assert model.roi_head.mask_head is None
    assert complexity._cascaded_masks(model) == 0


def test_size_of_the_images():
    def cfg(*steps):
        loader = dict(dataset=dict(pipeline=list(steps)))
        return Config(dict(test_dataloader=loader))

    load = dict(type='LoadImageFromFile')
    assert image_size(cfg(load, dict(type='Resize', scale=(1333, 800)))) == (800, 1280)
    assert image_size(cfg(load, dict(type='Resize', scale=(640, 480)))) == (480, 640)
    with pytest.raises(ValueError, match='no Resize with a scale; give size'):
        image_size(cfg(load, dict(type='Resize', scale_factor=2.0)))
