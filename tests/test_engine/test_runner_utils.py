import argparse
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from mmengine.config import Config

from deform_gqa.engine import runner_utils
from deform_gqa.engine.runner_utils import (
    check_common_arguments,
    load_config,
    use_amp,
    use_auto_scale_lr,
)


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


@pytest.fixture
def gloo(monkeypatch):
    """Prepares a config in a process that a launcher has started."""
    for name, value in dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0').items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, 'init_process_group', Mock())

    def prepare(**settings) -> Config:
        cfg = Config(dict(launcher='pytorch', **settings))
        runner_utils._use_gloo(cfg)
        return cfg

    return prepare


def test_gloo_wraps_without_devices(gloo):
    cfg = gloo(find_unused_parameters=True, model_wrapper_cfg=dict(static_graph=True))
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=True,
        static_graph=True,
        device_ids=None,
    )


@pytest.mark.parametrize('strategy', [None, dict(type='DDPStrategy', sync_bn='torch')])
def test_gloo_under_flexible_runner(gloo, strategy):
    cfg = gloo(runner_type='FlexibleRunner', strategy=strategy)
    assert cfg.strategy.type == 'DDPStrategy'
    assert cfg.strategy.get('sync_bn') == (strategy and 'torch')
    assert cfg.strategy.model_wrapper.device_ids is None
    assert 'model_wrapper_cfg' not in cfg


def test_other_strategies_are_left_alone(gloo):
    strategy = dict(type='FSDPStrategy')
    cfg = gloo(runner_type='FlexibleRunner', strategy=strategy)
    assert cfg.strategy == strategy
