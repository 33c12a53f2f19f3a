import argparse
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from deform_gqa.engine import runner_utils
from deform_gqa.engine.runner_utils import (
    check_common_arguments,
    load_config,
    use_amp,
    use_auto_scale_lr,
    use_tta,
)

FLIP = dict(type='RandomFlip', prob=1.0)
PACK = dict(type='PackDetInputs')


def make_args(**options) -> argparse.Namespace:
    return argparse.Namespace(
        **dict(
            dict(cfg_options=None, launcher='none', local_rank=0, work_dir=None),
            **options,
        )
    )


@pytest.fixture
def config_file(tmp_path) -> str:
    file = tmp_path / 'tiny.py'
    file.write_text("lr = 1\nwork_dir = None\nnested = dict(key='old')\n")
    return str(file)


def test_missing_config_file():
    with pytest.raises(FileNotFoundError, match=r"config file 'no\.py' does not exist"):
        check_common_arguments(make_args(config='no.py'))


@pytest.mark.parametrize(
    ('launcher', 'name'),
    [
        ('pytorch', 'RANK'),
        ('slurm', 'SLURM_PROCID'),
        ('mpi', 'OMPI_COMM_WORLD_RANK'),
    ],
)
def test_missing_variable_of_a_launcher(config_file, monkeypatch, launcher, name):
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f'{launcher!r} needs .* {name}, which'):
        check_common_arguments(make_args(config=config_file, launcher=launcher))


@pytest.mark.parametrize(
    ('launcher', 'names'),
    [
        ('slurm', ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID')),
        (
            'mpi',
            (
                'OMPI_COMM_WORLD_RANK',
                'OMPI_COMM_WORLD_SIZE',
                'OMPI_COMM_WORLD_LOCAL_RANK',
            ),
        ),
    ],
)
def test_missing_address_without_a_gpu(config_file, monkeypatch, launcher, names):
    for name in (*names, 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    args = make_args(config=config_file, launcher=launcher)
    check_common_arguments(args)
    for name in ('MASTER_PORT', 'MASTER_ADDR'):
        monkeypatch.delenv(name)
        with pytest.raises(ValueError, match=f'{launcher!r} without .* {name}, which'):
            check_common_arguments(args)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    check_common_arguments(args)


def test_local_rank_reaches_the_environment(config_file, monkeypatch):
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    monkeypatch.setenv('MASTER_PORT', '29500')
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('LOCAL_RANK', 'to be removed')
    monkeypatch.delenv('LOCAL_RANK')
    args = make_args(config=config_file, launcher='pytorch', local_rank=1)
    check_common_arguments(args)
    assert runner_utils.os.environ['LOCAL_RANK'] == '1'


def test_options_override_the_config(config_file):
    options = {'nested.key': 'new'}
    cfg = load_config(make_args(config=config_file, cfg_options=options))
    assert cfg.nested.key == 'new'
    assert cfg.launcher == 'none'


def test_work_dir(config_file):
    args = make_args(config=config_file)
    assert load_config(args).work_dir == str(Path('work_dirs', 'tiny'))
    args.cfg_options = dict(work_dir='of_config')
    assert load_config(args).work_dir == 'of_config'
    args.work_dir = 'of_command'
    assert load_config(args).work_dir == 'of_command'


def test_amp(monkeypatch):
    optim = dict(type='OptimWrapper', loss_scale=512.0, optimizer=dict(type='SGD'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    cfg = Config(dict(optim_wrapper=optim))
    use_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 512.0
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    use_amp(cfg)
    assert cfg.optim_wrapper == dict(
        type='BFloat16OptimWrapper', optimizer=dict(type='SGD')
    )


def test_amp_without_optimizer_wrapper():
    with pytest.raises(ValueError, match=r'--amp needs optim_wrapper .* got None'):
        use_amp(Config(dict(model=dict(type='RetinaNet'))))


def test_auto_scale_lr():
    cfg = Config(dict(auto_scale_lr=dict(enable=False, base_batch_size=16)))
    use_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable
    for settings in (dict(), dict(auto_scale_lr=dict(enable=False))):
        with pytest.raises(ValueError, match=r'needs auto_scale_lr=.*, got'):
            use_auto_scale_lr(Config(settings))


def test_tta_of_a_wrapped_dataset():
    inner = dict(type='CocoDataset', pipeline=[FLIP, PACK])
    loader = dict(dataset=dict(type='RepeatDataset', dataset=inner))
    cfg = Config(dict(model=dict(type='RetinaNet'), test_dataloader=loader))
    use_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module == dict(type='RetinaNet')
    pipeline = cfg.test_dataloader.dataset.dataset.pipeline
    assert pipeline[0] == FLIP
    assert pipeline[-1].type == 'TestTimeAug'


def test_tta_of_the_config():
    loader = dict(dataset=dict(type='CocoDataset', pipeline=[PACK]))
    cfg = Config(
        dict(
            model=dict(type='RetinaNet'),
            test_dataloader=loader,
            tta_model=dict(type='MyTTAModel'),
            tta_pipeline=[FLIP, PACK],
        )
    )
    use_tta(cfg)
    assert cfg.model == dict(type='MyTTAModel', module=dict(type='RetinaNet'))
    assert cfg.test_dataloader.dataset.pipeline == [FLIP, PACK]


MASKS = [
    dict(type='Mask2Former', panoptic_head=dict(type='Mask2FormerHead')),
    dict(type='SOLO', mask_head=dict(type='SOLOHead')),
    dict(type='MaskRCNN', roi_head=dict(mask_head=dict(type='FCNMaskHead'))),
    dict(type='CascadeRCNN', roi_head=dict(mask_head=[dict(type='FCNMaskHead')])),
]


@pytest.mark.parametrize('model', MASKS, ids=lambda model: model['type'])
def test_tta_of_masks_needs_a_model_that_merges_them(model):
    loader = dict(dataset=dict(type='CocoDataset', pipeline=[PACK]))
    settings = dict(model=model, test_dataloader=loader)
    cfg = Config(settings)
    with pytest.raises(ValueError, match=f'merges boxes and no masks.*{model["type"]}'):
        use_tta(cfg)
    assert cfg.model == model
    cfg = Config(dict(settings, tta_model=dict(type='MyTTAModel')))
    use_tta(cfg)
    assert cfg.model.type == 'MyTTAModel'


def test_tta_without_masks_in_a_two_stage_model():
    loader = dict(dataset=dict(type='CocoDataset', pipeline=[PACK]))
    model = dict(type='FasterRCNN', roi_head=dict(bbox_head=dict(), mask_head=None))
    cfg = Config(dict(model=model, test_dataloader=loader))
    use_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'


def test_tta_without_test_data():
    with pytest.raises(ValueError, match=r'--tta needs test_dataloader .* got None'):
        use_tta(Config(dict(model=dict(type='RetinaNet'))))
