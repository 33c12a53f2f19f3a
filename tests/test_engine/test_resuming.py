import logging

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.runner import IterBasedTrainLoop

from deform_gqa.engine import ResumableCheckpointHook, resuming
from deform_gqa.engine.checkpoint_io import point_to_checkpoint
from deform_gqa.engine.resuming import choose_start, use_resumable_training

OURS = dict(type='ResumableCheckpointHook', interval=1)
PREEMPTION = dict(type='PreemptionHook')


@pytest.fixture
def warnings(monkeypatch):
    texts = []

    def note(text, logger, level):
        assert (logger, level) == ('current', logging.WARNING)
        texts.append(text)

    monkeypatch.setattr(resuming, 'print_log', note)
    return texts


@pytest.mark.parametrize(
    'chosen',
    [
        dict(),
        dict(default_hooks=dict()),
        dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1))),
        dict(
            default_hooks=dict(
                checkpoint=dict(type='mmengine.CheckpointHook', interval=1)
            )
        ),
        dict(default_hooks=dict(checkpoint=dict(type=CheckpointHook, interval=1))),
        dict(default_hooks=dict(checkpoint=OURS)),
    ],
)
def test_every_way_to_name_mmengines_hook(chosen, warnings):
    cfg = Config(chosen)
    use_resumable_training(cfg)
    assert cfg.default_hooks == dict(checkpoint=OURS, preemption=PREEMPTION)
    assert not warnings


def test_hooks_of_the_user(warnings):
    own = dict(type='PreemptionHook', signals=['SIGINT'])
    cfg = Config(dict(default_hooks=dict(checkpoint=None, preemption=own)))
    cfg.custom_hooks = [dict(type='CheckpointHook', interval=1), dict(type='EMAHook')]
    use_resumable_training(cfg)
    assert cfg.custom_hooks == [OURS, dict(type='EMAHook')]
    assert cfg.default_hooks.preemption == own
    cfg = Config(
        dict(default_hooks=dict(checkpoint=dict(type=ResumableCheckpointHook)))
    )
    use_resumable_training(cfg)
    assert cfg.default_hooks.preemption == PREEMPTION
    assert not warnings


@pytest.mark.parametrize('hook', [dict(type='MyHook'), None])
def test_a_hook_of_another_kind_is_left_with_a_warning(hook, warnings):
    cfg = Config(dict(default_hooks=dict(checkpoint=hook)))
    use_resumable_training(cfg)
    assert cfg.default_hooks == dict(checkpoint=hook)
    assert warnings == [
        f'default_hooks.checkpoint={hook} is not one of ours: a run that is killed may '
        'not end with the same weights when it is resumed'
    ]


@pytest.mark.parametrize(
    ('chosen', 'expected'),
    [
        (dict(by_epoch=True, max_epochs=1), 'ResumableEpochBasedTrainLoop'),
        (dict(max_epochs=1), 'ResumableEpochBasedTrainLoop'),
        (dict(by_epoch=False, max_iters=1), 'ResumableIterBasedTrainLoop'),
        (dict(type='EpochBasedTrainLoop'), 'ResumableEpochBasedTrainLoop'),
        (dict(type='mmengine.IterBasedTrainLoop'), 'ResumableIterBasedTrainLoop'),
        (dict(type=IterBasedTrainLoop), 'ResumableIterBasedTrainLoop'),
        (dict(type='ResumableIterBasedTrainLoop'), 'ResumableIterBasedTrainLoop'),
    ],
)
def test_loops(chosen, expected, warnings):
    cfg = Config(dict(train_cfg=chosen))
    use_resumable_training(cfg)
    assert cfg.train_cfg.type == expected
    assert 'by_epoch' not in cfg.train_cfg
    assert not warnings


def test_a_loop_of_another_kind_is_left_with_a_warning(warnings):
    cfg = Config(dict(train_cfg=dict(type='MyLoop')))
    use_resumable_training(cfg)
    assert cfg.train_cfg.type == 'MyLoop'
    assert "train_cfg={'type': 'MyLoop'} is not one of ours" in warnings[0]


@pytest.fixture
def files(tmp_path):
    """Pretrained weights, and a work folder with a checkpoint."""
    for name in ('pretrained.pth', 'work/epoch_1.pth'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(dict(state_dict={}), tmp_path / name)
    point_to_checkpoint(tmp_path / 'work', str(tmp_path / 'work' / 'epoch_1.pth'))
    return tmp_path


@pytest.mark.parametrize(
    ('resume', 'work_dir', 'expected'),
    [
        (None, 'work', (False, 'pretrained.pth')),
        ('auto', 'empty', (False, 'pretrained.pth')),
        ('auto', 'work', (True, 'work/epoch_1.pth')),
        ('work/epoch_1.pth', 'empty', (True, 'work/epoch_1.pth')),
    ],
)
def test_what_a_preemptible_job_starts_from(files, resume, work_dir, expected):
    cfg = Config(dict(load_from=str(files / 'pretrained.pth'), resume=False))
    cfg.work_dir = str(files / work_dir)
    if resume not in (None, 'auto'):
        resume = str(files / resume)
    choose_start(cfg, resume)
    assert (cfg.resume, cfg.load_from) == (expected[0], str(files / expected[1]))


def test_a_config_that_resumes(files):
    cfg = Config(dict(resume=True, work_dir=str(files / 'work')))
    choose_start(cfg, None)
    assert (cfg.resume, cfg.load_from) == (True, str(files / 'work' / 'epoch_1.pth'))
    cfg = Config(dict(resume=True, work_dir=str(files / 'empty')))
    choose_start(cfg, None)
    assert (cfg.resume, cfg.get('load_from')) == (False, None)


def test_missing_weights_are_an_error_while_nothing_is_to_be_resumed(files):
    cfg = Config(dict(load_from='no.pth', work_dir=str(files / 'empty')))
    with pytest.raises(FileNotFoundError, match=r"'no\.pth' does not exist"):
        choose_start(cfg, 'auto')
    cfg.work_dir = str(files / 'work')
    choose_start(cfg, 'auto')
