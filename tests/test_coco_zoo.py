"""The COCO configs of DAT, at an eighth of their width, and the tables about them."""

import copy
import functools
import re
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from metafiles import metadata_of
from mmcv.transforms import Compose
from mmdet.registry import HOOKS, MODELS
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
FPN_CONFIGS = [path for path in CONFIGS if '_fpn_' in path]
OTHER_CONFIGS = [path for path in CONFIGS if '_fpn_' not in path]
SHRINK = 8
DAT_WEIGHT_DECAY = 0.05
CHANNELS = ('in_channels', 'out_channels', 'feat_channels', 'conv_out_channels')
NARROW = {
    **{(name, 256): 16 for name in CHANNELS},
    **{(name, 128): 16 for name in CHANNELS},
    ('fc_out_channels', 1024): 16,
    ('embed_dims', 256): 16,
    ('num_feats', 128): 8,
    ('num_groups', 32): 4,
    ('feedforward_channels', 1024): 16,
    ('feedforward_channels', 2048): 16,
    ('num_layers', 6): 2,
    ('num_queries', 300): 20,
    ('num_queries', 900): 20,
    ('num', 256): 16,  # samples of an assignment
    ('num', 512): 16,
    ('max_per_img', 1000): 30,
    ('max_per_img', 2000): 30,
}


@pytest.fixture(autouse=True, scope='module')
def _registered():
    register_all_modules()


@functools.cache
def read(path: str) -> Config:
    return Config.fromfile(ROOT / path)


def config_of(path: str) -> Config:
    return copy.deepcopy(read(path))


def detector(cfg: Config) -> Config:
    """The detector's own config, also of one whose attention is swapped."""
    return cfg.model.model if cfg.model.type == 'swap_attention' else cfg.model


def shrink(model: Config) -> None:
    """Two blocks a stage, an eighth of the channels, narrow heads, few proposals."""
    arch = resolve_arch(model.backbone.arch)
    arch['embed_dims'] = [dim // SHRINK for dim in arch['embed_dims']]
    arch['stem_dim'] = arch['embed_dims'][0]
    arch['block_types'] = [letters[:2] for letters in arch['block_types']]
    arch['depths'] = [len(letters) for letters in arch['block_types']]
    model.backbone.arch = arch
    model.neck.in_channels = [dim // SHRINK for dim in model.neck.in_channels]
    if 'encoder' in model:
        model.bbox_head.embed_dims = 256  # the default
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
    cfg = config_of(path)
    shrink(detector(cfg))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if hasattr(model, 'level_embed'):  # any memory until init_weights
        torch.nn.init.normal_(model.level_embed)
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
    if cfg.optim_wrapper.optimizer.weight_decay != DAT_WEIGHT_DECAY:
        assert cfg.optim_wrapper.optimizer.weight_decay == 1e-4  # the recipe of DETRs
        return
    undecayed = {
        id(parameter)
        for group in optim.optimizer.param_groups
        if group['weight_decay'] == 0
        for parameter in group['params']
    }
    for name, parameter in model.backbone.named_parameters():
        if name.endswith(('table', 'rpb', 'bias', 'norm.weight')):
            assert id(parameter) in undecayed, name


def draw(pipeline: Compose, info: dict) -> dict:
    """Like a dataset: anew where a crop has left no object."""
    while (sample := pipeline(copy.deepcopy(info))) is None:
        pass
    return sample


@pytest.mark.parametrize('path', [p for p in CONFIGS if 'dat-t-pp_' in p])
def test_pipelines(path, tmp_path):
    cfg = config_of(path)
    image = tmp_path / 'image.png'
    mmcv.imwrite(np.zeros((60, 80, 3), np.uint8), str(image))
    box = dict(bbox=[10, 10, 50, 40], bbox_label=3, ignore_flag=0)
    box['mask'] = [[10.0, 10, 50, 10, 50, 40, 10, 40]]
    for _ in range(6):  # a choice is drawn
        info = dict(img_path=str(image), img_id=0, height=60, width=80, instances=[box])
        sample = draw(Compose(cfg.train_dataloader.dataset.pipeline), info)
        assert min(sample['inputs'].shape[1:]) >= 384
        found = sample['data_samples'].gt_instances
        assert ('masks' in found) == ('rcnn' in path)
    info = dict(img_path=str(image), img_id=0, height=60, width=80, instances=[])
    sample = Compose(cfg.test_dataloader.dataset.pipeline)(info)['data_samples']
    assert sample.ori_shape == (60, 80) and len(sample.scale_factor) == 2


@pytest.mark.parametrize('path', FPN_CONFIGS)
def test_schedule(path):
    cfg = config_of(path)
    epochs, milestones = (36, [27, 33]) if '3x' in path else (12, [8, 11])
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.param_scheduler[1].milestones == milestones
    assert cfg.optim_wrapper.optimizer.lr == (5e-5 if 'retinanet' in path else 1e-4)


@pytest.mark.parametrize('path', OTHER_CONFIGS)
def test_schedule_of_the_detectors_without_fpn(path):
    cfg = config_of(path)
    epochs = int(re.search(r'-(\d+)e_coco', path)[1])
    gpus, images = map(int, re.search(r'_(\d+)xb(\d+)-', path).groups())
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.param_scheduler[-1].end == epochs
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr.base_batch_size == gpus * images
    for hook in cfg.get('custom_hooks', []):
        if hook.type == 'PipelineSwitchHook':
            assert hook.switch_epoch == epochs - 10
            Compose(hook.switch_pipeline)


def test_example_of_layer_wise_rates():
    cfg = read('configs/dat/mask-rcnn_dat-t-pp_fpn_ms-crop-3x-layer-decay_coco.py')
    model = torch.nn.Module()
    with torch.device('meta'):
        model.backbone = MODELS.build(cfg.model.backbone)
        model.head = torch.nn.Linear(2, 2)
    optim = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    rates = {group['lr'] for group in optim.optimizer.param_groups}
    lr = cfg.optim_wrapper.optimizer.lr
    assert len(rates) == 28 and max(rates) == lr
    assert min(rates) == pytest.approx(lr * 0.95**27)


def test_example_of_averaged_weights():
    cfg = read('configs/dat/mask-rcnn_dat-t-pp_fpn_ms-crop-3x-ema_coco.py')
    [hook] = cfg.custom_hooks
    assert HOOKS.build(hook).ema_cfg['type'] == 'ExpMomentumEMA'


@pytest.mark.parametrize('path', CONFIGS)
def test_neck_heads_and_metric(path):
    cfg = config_of(path)
    assert cfg.val_evaluator.type == cfg.test_evaluator.type == 'AutoCocoMetric'
    model = detector(cfg)
    arch = resolve_arch(model.backbone.arch)
    dims = list(arch['embed_dims'])
    assert model.neck.in_channels == dims[-len(model.neck.in_channels) :]
    heads = model.backbone.get('num_kv_heads', arch['num_heads'])
    assert all(q % kv == 0 for q, kv in zip(arch['num_heads'], heads, strict=True))
    assert ('gqa' in Path(path).name) == (tuple(heads) != tuple(arch['num_heads']))


def built_parameters(cfg: Config) -> tuple[int, int]:
    """Of the backbone and of the detector."""
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    return tuple(
        sum(parameter.numel() for parameter in part.parameters())
        for part in (model.backbone, model)
    )


@pytest.fixture(scope='module', params=FOLDERS)
def parameters(request):
    """Of the backbone and of the detector, by config of one folder."""
    counted, by_config = {}, {}
    for path in CONFIGS:
        if Path(path).parent.as_posix() == request.param:
            cfg = config_of(path)
            detector(cfg).backbone.pop('drop_path_rate', None)
            model = str(cfg.model)  # the same for all schedules
            if model not in counted:
                counted[model] = built_parameters(cfg)
            by_config[path] = counted[model]
    return by_config


def test_metafiles_have_parameters_and_epochs(parameters):
    for path, (_, counted) in parameters.items():
        metadata = metadata_of(path)
        assert metadata['Parameters'] == counted, path
        assert metadata['Epochs'] == read(path).train_cfg.max_epochs, path


def test_tables_have_the_numbers_of_the_metafiles(parameters):
    folder = Path(next(iter(parameters))).parent
    text = (ROOT / folder / 'README.md').read_text()
    listed = set()
    for row in re.findall(r'.*\| [\d.]+ M, [\d.]+ M \| \d+ \|.*', text):
        backbone, whole, flops = re.search(
            r'\| ([\d.]+) M, ([\d.]+) M \| (\d+) \|', row
        ).groups()
        for name in re.findall(r'\]\(([\w.-]+\.py)\)', row):
            path = (folder / name).as_posix()
            listed.add(path)
            assert [backbone, whole] == [f'{n / 1e6:.1f}' for n in parameters[path]]
            assert flops == f'{metadata_of(path)["FLOPs"] / 1e9:.0f}', path
    assert listed == set(parameters)
