"""The COCO configs of DAT, at an eighth of their width, and the tables about them."""

import re
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper

from deform_gqa.archs import resolve_arch

ROOT = Path(__file__).parents[1]
FOLDERS = ('configs/dat', 'configs/dat_gqa')
CONFIGS = [
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob('*.py'))
]
SHRINK = 8
CHANNELS = ('in_channels', 'out_channels', 'feat_channels', 'conv_out_channels')
NARROW = {
    **{(name, 256): 16 for name in CHANNELS},
    ('fc_out_channels', 1024): 16,
    ('num', 256): 16,  # samples of an assignment
    ('num', 512): 16,
    ('max_per_img', 1000): 30,
    ('max_per_img', 2000): 30,
}


@pytest.fixture(autouse=True, scope='module')
def _registered():
    register_all_modules()


def shrink(model: Config) -> None:
    """Two blocks a stage, an eighth of the channels, narrow heads, few proposals."""
    arch = resolve_arch(model.backbone.arch)
    arch['embed_dims'] = [dim // SHRINK for dim in arch['embed_dims']]
    arch['stem_dim'] = arch['embed_dims'][0]
    arch['block_types'] = [letters[:2] for letters in arch['block_types']]
    arch['depths'] = [len(letters) for letters in arch['block_types']]
    model.backbone.arch = arch
    model.neck.in_channels = [dim // SHRINK for dim in model.neck.in_channels]
    replace_numbers(model, NARROW)


def replace_numbers(node, numbers) -> None:
    """Sets what has these names and numbers, at any depth, to others."""
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list):
            replace_numbers(value, numbers)
        elif (name, value) in numbers:
            node[name] = numbers[name, value]


@pytest.mark.parametrize('path', CONFIGS)
def test_a_step_of_training_and_a_prediction(path):
    cfg = Config.fromfile(ROOT / path)
    shrink(cfg.model)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    optim = build_optim_wrapper(model, cfg.optim_wrapper)
    inputs = demo_mm_inputs(
        2, [[3, 64, 96], [3, 60, 70]], num_classes=80, with_mask='rcnn' in path
    )
    data = model.data_preprocessor(inputs, training=True)
    losses, _ = model.parse_losses(model.forward(**data, mode='loss'))
    assert losses.isfinite()
    optim.update_params(losses)
    model.eval()
    with torch.no_grad():
        assert len(model.forward(**data, mode='predict')) == 2
    undecayed = {
        id(parameter)
        for group in optim.optimizer.param_groups
        if group['weight_decay'] == 0
        for parameter in group['params']
    }
    for name, parameter in model.backbone.named_parameters():
        if name.endswith(('table', 'rpb', 'bias', 'norm.weight')):
            assert id(parameter) in undecayed, name


@pytest.mark.parametrize('path', [p for p in CONFIGS if 'dat-t-pp_' in p])
def test_pipelines(path, tmp_path):
    cfg = Config.fromfile(ROOT / path)
    image = tmp_path / 'image.png'
    mmcv.imwrite(np.zeros((60, 80, 3), np.uint8), str(image))
    box = dict(bbox=[10, 10, 50, 40], bbox_label=3, ignore_flag=0)
    box['mask'] = [[10.0, 10, 50, 10, 50, 40, 10, 40]]
    for _ in range(6):  # a choice is drawn
        info = dict(img_path=str(image), img_id=0, height=60, width=80, instances=[box])
        sample = Compose(cfg.train_dataloader.dataset.pipeline)(info)
        assert min(sample['inputs'].shape[1:]) >= 384
        found = sample['data_samples'].gt_instances
        assert ('masks' in found) == ('rcnn' in path)
    info = dict(img_path=str(image), img_id=0, height=60, width=80, instances=[])
    sample = Compose(cfg.test_dataloader.dataset.pipeline)(info)['data_samples']
    assert sample.ori_shape == (60, 80) and len(sample.scale_factor) == 2


@pytest.mark.parametrize('path', CONFIGS)
def test_schedule(path):
    cfg = Config.fromfile(ROOT / path)
    epochs, milestones = (36, [27, 33]) if '3x' in path else (12, [8, 11])
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.param_scheduler[1].milestones == milestones
    assert cfg.optim_wrapper.optimizer.lr == (5e-5 if 'retinanet' in path else 1e-4)
    arch = resolve_arch(cfg.model.backbone.arch)
    dims = list(arch['embed_dims'])
    assert cfg.model.neck.in_channels == dims[-len(cfg.model.neck.in_channels) :]
    heads = cfg.model.backbone.get('num_kv_heads', arch['num_heads'])
    assert all(q % kv == 0 for q, kv in zip(arch['num_heads'], heads, strict=True))
    assert ('gqa' in Path(path).name) == (tuple(heads) != tuple(arch['num_heads']))


def rows(folder):
    """(name of a config, millions of parameters of backbone and detector)."""
    text = (ROOT / folder / 'README.md').read_text()
    return re.findall(
        r'\[12\]\(([\w.-]+)\), \[36\]\([\w.-]+\) \| ([\d.]+) M, ([\d.]+) M', text
    )


@pytest.mark.parametrize('folder', FOLDERS)
def test_tables_have_the_parameters(folder):
    found = rows(folder)
    assert len(found) * 2 == sum(path.startswith(f'{folder}/') for path in CONFIGS)
    for name, backbone, detector in found:
        cfg = Config.fromfile(ROOT / folder / name)
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
        for part, millions in ((model.backbone, backbone), (model, detector)):
            counted = sum(parameter.numel() for parameter in part.parameters())
            assert f'{counted / 1e6:.1f}' == millions, name
