"""Every config builds its detector and its data pipelines, and runs a training step."""

from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from metafiles import metadata_of
from mmcv.transforms import Compose
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ('configs/*/*.py', 'projects/*/configs/*.py')
    for path in ROOT.glob(pattern)
    if '_base_' not in path.parts
    and path.parent.name not in ('dat', 'dat_gqa')  # see test_coco_zoo.py
)
# Parameters that the DAT recipe keeps free of weight decay.
UNDECAYED = ('rpe_table', 'relative_position_bias_table', 'rpb', 'bias', 'norm.weight')


@pytest.fixture(autouse=True, scope='module')
def _registered():
    register_all_modules()


def num_classes(model) -> int:
    if hasattr(model, 'panoptic_head'):
        return model.panoptic_head.num_classes
    head = model.bbox_head if hasattr(model, 'bbox_head') else model.roi_head.bbox_head
    return head.num_classes


def run_pipelines(cfg, tmp_path):
    """On an image without objects; detectors need the scale to map boxes back."""
    image = tmp_path / 'image.png'
    mmcv.imwrite(np.zeros((60, 80, 3), dtype=np.uint8), str(image))
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        info = dict(img_path=str(image), img_id=0, height=60, width=80, instances=[])
        sample = Compose(cfg[loader].dataset.pipeline)(info)['data_samples']
        assert sample.ori_shape == (60, 80)
        assert len(sample.scale_factor) == 2


@pytest.mark.parametrize('path', CONFIGS)
def test_config(path, tmp_path):
    cfg = Config.fromfile(ROOT / path)
    model = MODELS.build(cfg.model)
    if hasattr(model, 'level_embed'):  # any memory until init_weights
        torch.nn.init.normal_(model.level_embed)
    if path.startswith('configs/'):
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert metadata_of(path)['Parameters'] == counted
    run_pipelines(cfg, tmp_path)
    optim = build_optim_wrapper(model, cfg.optim_wrapper)

    model.data_preprocessor.batch_augments = None  # to images of 1024 x 1024
    # DINO chooses 900 queries among the pixels of all maps.
    height = 256 if 'DINO' in str(cfg.model) else 128
    inputs = demo_mm_inputs(
        2,
        [[3, height, 160 + height - 128], [3, 120, 130]],
        num_classes=num_classes(model) + 1,  # labels drawn: 1 to num_classes
        with_mask='mask_head' in str(cfg.model) or 'Mask2Former' in str(cfg.model),
    )
    for sample in inputs['data_samples']:
        sample.gt_instances.labels -= 1
    data = model.data_preprocessor(inputs, training=True)
    losses, _ = model.parse_losses(model.forward(**data, mode='loss'))
    assert losses.isfinite()
    optim.update_params(losses)
    model.eval()
    with torch.no_grad():
        assert len(model.forward(**data, mode='predict')) == 2


@pytest.mark.parametrize('path', [c for c in CONFIGS if 'dat' in Path(c).stem])
def test_no_weight_decay_for_norms_tables_and_biases(path):
    cfg = Config.fromfile(ROOT / path)
    model = MODELS.build(cfg.model)
    optim = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optim.optimizer.param_groups:
        for parameter in group['params']:
            name = names[id(parameter)]
            if name.startswith('backbone.') and name.endswith(UNDECAYED):
                assert group['weight_decay'] == 0, name
