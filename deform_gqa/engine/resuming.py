"""Makes the training of a config one that can be killed and resumed at any time."""

import logging

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from deform_gqa.engine.checkpoint_io import (
    check_checkpoint,
    find_checkpoint_to_resume,
)

__all__ = ['choose_start', 'use_resumable_training']


def use_resumable_training(cfg: Config) -> None:
    """Replaces mmengine's checkpoint hook and training loop by ours.

    They take the same options. A hook that stops a run on SIGTERM and SIGUSR1 is added.
    Classes of other names are left as they are, and a warning names them.
    """
    cfg.setdefault('default_hooks', {})
    default_hooks = cfg.default_hooks
    default_hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    candidates = [default_hooks.checkpoint, *(cfg.get('custom_hooks') or [])]
    found = [x for x in candidates if x is not None and _is(x['type'], CheckpointHook)]
    for hook in found:
        hook['type'] = 'ResumableCheckpointHook'
    resumable = [x for x in candidates if _is_ours(x, 'ResumableCheckpointHook')]
    if resumable:
        default_hooks.setdefault('preemption', dict(type='PreemptionHook'))
    else:
        _warn('default_hooks.checkpoint', default_hooks.checkpoint)
    if cfg.get('train_cfg') is not None:
        _use_resumable_loop(cfg.train_cfg)


def _use_resumable_loop(train_cfg: dict) -> None:
    if 'type' not in train_cfg:  # as mmengine chooses
        by_epoch = train_cfg.pop('by_epoch', True)
        train_cfg['type'] = EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop
    for loop in (EpochBasedTrainLoop, IterBasedTrainLoop):
        if _is(train_cfg['type'], loop):
            train_cfg['type'] = f'Resumable{loop.__name__}'
            return
    if not str(train_cfg['type']).startswith('Resumable'):
        _warn('train_cfg', train_cfg)


def _is(chosen: str | type, wanted: type) -> bool:
    """Whether a config names this class: by its name, with a scope or as such."""
    if isinstance(chosen, str):
        return chosen in (wanted.__name__, f'mmengine.{wanted.__name__}')
    return chosen is wanted


def _is_ours(hook: dict | None, name: str) -> bool:
    return hook is not None and getattr(hook['type'], '__name__', hook['type']) == name


def _warn(place: str, chosen: dict | None) -> None:
    print_log(
        f'{place}={chosen} is not one of ours: a run that is killed may not end with '
        'the same weights when it is resumed',
        logger='current',
        level=logging.WARNING,
    )


def choose_start(cfg: Config, resume: str | None) -> None:
    """Decides what a training starts from, and checks that it can be read.

    Args:
        cfg (Config): ``resume`` and ``load_from`` are set. A job that may be preempted
            passes ``resume='auto'`` each time: it starts from ``load_from`` while
            there is nothing to resume.
        resume (str, optional): A checkpoint, ``'auto'`` for the newest in the work
            folder if there is one, or None to do as the config says.

    Raises:
        FileNotFoundError: A checkpoint is missing.
        ValueError: A checkpoint is damaged or unsafe to read.
    """
    if resume is None and cfg.get('resume') and cfg.get('load_from') is None:
        resume = 'auto'
    if resume == 'auto':
        newest = find_checkpoint_to_resume(cfg.work_dir)
        cfg.resume = newest is not None
        if newest is not None:
            cfg.load_from = newest
    elif resume is not None:
        cfg.resume, cfg.load_from = True, resume
    if cfg.get('load_from') is not None:
        check_checkpoint(cfg.load_from)
