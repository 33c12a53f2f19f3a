"""What the command-line tools for training and testing share."""

import argparse
import os
from pathlib import Path

import torch
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine._strategy import DDPStrategy
from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from deform_gqa.engine.checkpoint_io import use_safe_loading
from deform_gqa.engine.hooks.weights_check_hook import WeightsCheckHook

__all__ = [
    'add_common_arguments',
    'build_runner',
    'check_common_arguments',
    'check_has',
    'leave_process_group',
    'load_config',
    'use_amp',
    'use_auto_scale_lr',
]

# Each launcher's names for the rank, the number of processes and the local rank.
_LAUNCHER_VARIABLES = dict(
    pytorch=('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    slurm=('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    mpi=(
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
    ),
)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that training and testing both have."""
    parser.add_argument('--work-dir', help='folder for logs, metrics and checkpoints')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings that override those of the config, as key=value with dots in '
        'the key; lists as key="[a,b]" or key=a,b, nested as key="[(a,b),(c,d)]", '
        'with the quotation marks and without spaces',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', *_LAUNCHER_VARIABLES],
        default='none',
        help='what started the processes of a distributed run',
    )
    # torch.distributed.launch passes it, with a hyphen since PyTorch 2.0.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def check_common_arguments(args: argparse.Namespace) -> None:
    """Finds mistakes in the options before anything is imported, built or written.

    Raises:
        FileNotFoundError: There is no config file at ``args.config``.
        ValueError: A variable that ``args.launcher`` sets is missing, or one that a
            run without GPUs needs.
    """
    if not os.path.isfile(args.config):
        raise FileNotFoundError(f'config file {args.config!r} does not exist')
    if args.launcher != 'none':
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
        for name in _LAUNCHER_VARIABLES[args.launcher]:
            if name not in os.environ:
                raise ValueError(
                    f'launcher {args.launcher!r} needs the environment variable '
                    f'{name}, which is not set; start a run with '
                    'tools/dist_*.sh or tools/slurm_*.sh'
                )
        if not torch.cuda.is_available():
            _check_gloo_address(args.launcher)


def _check_gloo_address(launcher: str) -> None:
    """mmengine derives the address under Slurm, but for NCCL alone."""
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        if name not in os.environ:
            raise ValueError(
                f'launcher {launcher!r} without a GPU needs the environment variable '
                f'{name}, which is not set; export the host (MASTER_ADDR) and a free '
                'port (MASTER_PORT) of the process of rank 0'
            )


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies the options that both tools have.

    The work folder is that of the command line, else the config's, else
    ``work_dirs/`` and the name of the config.
    """
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Builds the runner, in a process set up for safe loading and for the CPU."""
    setup_cache_size_limit_of_dynamo()
    use_safe_loading()
    if cfg.launcher != 'none' and not torch.cuda.is_available():
        _use_gloo(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(WeightsCheckHook())
    return runner


def _use_gloo(cfg: Config) -> None:
    """Prepares a distributed run without a GPU; mmengine would select a CUDA device.

    The runner keeps a process group that exists, and a wrapper's ``device_ids``.
    """
    names = _LAUNCHER_VARIABLES[cfg.launcher]
    rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    os.environ['LOCAL_RANK'] = str(local_rank)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=world_size)
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    if 'runner_type' not in cfg:
        wrapper.update(cfg.get('model_wrapper_cfg') or {})
        cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)
        return
    # FlexibleRunner leaves wrapping to a strategy.
    strategy = cfg.get('strategy') or dict(type='DDPStrategy')
    if strategy['type'] in ('DDPStrategy', DDPStrategy):
        wrapper.update(strategy.get('model_wrapper') or {})
        cfg.strategy = dict(strategy, model_wrapper=dict(wrapper, device_ids=None))


def leave_process_group() -> None:
    """Ends a distributed run; gloo's threads abort a process that just exits."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def use_amp(cfg: Config) -> None:
    """Turns on mixed precision: float16 on a GPU, bfloat16 on the CPU.

    Raises:
        ValueError: The config has no optimizer wrapper.
    """
    check_has(cfg, 'optim_wrapper', '--amp')
    if torch.cuda.is_available():
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    else:
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
        for option in ('loss_scale', 'dtype'):
            cfg.optim_wrapper.pop(option, None)


def check_has(cfg: Config, name: str, option: str) -> None:
    """Raises a ValueError if a config lacks what an option needs."""
    if cfg.get(name) is None:
        raise ValueError(f'{option} needs {name} in the config, got {cfg.get(name)!r}')


def use_auto_scale_lr(cfg: Config) -> None:
    """Scales the learning rate with the batch size.

    Raises:
        ValueError: The config does not say for which batch size its rate is meant.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise ValueError(
            '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the '
            f'config, got auto_scale_lr={cfg.get("auto_scale_lr")!r}'
        )
    cfg.auto_scale_lr.enable = True
