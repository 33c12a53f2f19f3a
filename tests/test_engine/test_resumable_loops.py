"""Trainings that are cut in the middle and go on end as without the cut."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from tiny_training import CutHook, Points, PowerCutError, make_runner
from torch.utils.data import IterableDataset

from deform_gqa.engine import load_checkpoint

EPOCHS = dict(type='ResumableEpochBasedTrainLoop', max_epochs=3)
ITERS = dict(type='ResumableIterBasedTrainLoop', max_iters=8, val_interval=3)
EVERY_ITER = dict(by_epoch=False, interval=1)


class Indices(Hook):
    """Notes the batch index of every iteration."""

    def __init__(self) -> None:
        self.seen = []

    def after_train_iter(self, runner, batch_idx, **kwargs) -> None:
        self.seen.append(batch_idx)


class Stream(IterableDataset):
    def __len__(self) -> int:
        return 12

    def __iter__(self):
        return iter([dict(inputs=torch.ones(4))] * 12)


def train(work_dir: Path, cut: int | None = None, **options):
    """Trains; with ``cut``, up to the middle of that iteration."""
    hooks = [] if cut is None else [CutHook('before_train_iter', cut)]
    options['hooks'] = (*hooks, *options.get('hooks', ()))
    runner = make_runner(str(work_dir), **options)
    if cut is None:
        runner.train()
        return runner.model.state_dict()
    with pytest.raises(PowerCutError):
        runner.train()
    return None


def assert_same_weights(first: dict, second: dict) -> None:
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Weights without a break, by loop and sampler."""
    folder = tmp_path_factory.mktemp('whole')
    known = {}

    def get(loop: dict, sampler: str = 'DefaultSampler') -> dict:
        key = (loop['type'], sampler)
        if key not in known:
            options = dict(loop=dict(loop), sampler=sampler)
            known[key] = train(folder / '_'.join(key), **options, **EVERY_ITER)
        return known[key]

    return get


@pytest.mark.parametrize('cut', [2, 3, 4, 6, 9])
def test_middle_of_an_epoch(tmp_path, whole, cut):
    options = dict(loop=dict(EPOCHS), **EVERY_ITER)
    train(tmp_path, cut, **options)
    Points.loaded.clear()
    indices = Indices()
    resumed = train(tmp_path, resume=True, hooks=(indices,), **options)
    validations = 12 * (3 - (cut - 1) // 3)
    assert len(Points.loaded) == 4 * (10 - cut) + validations
    assert indices.seen == [0, 1, 2, 0, 1, 2, 0, 1, 2][cut - 1 :]
    assert_same_weights(whole(EPOCHS), resumed)
    assert load_checkpoint(tmp_path / 'iter_9.pth')['meta']['iter'] == 9


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_change_nothing(tmp_path, whole, workers):
    options = dict(loop=dict(EPOCHS), workers=workers, **EVERY_ITER)
    train(tmp_path, 3, **options)
    options['workers'] = 3 - workers
    assert_same_weights(whole(EPOCHS), train(tmp_path, resume=True, **options))


@pytest.mark.parametrize('sampler', ['DefaultSampler', 'InfiniteSampler'])
@pytest.mark.parametrize('cut', [2, 4, 7])
def test_iterations(tmp_path, whole, sampler, cut):
    options = dict(loop=dict(ITERS), sampler=sampler, **EVERY_ITER)
    train(tmp_path, cut, **options)
    Points.loaded.clear()
    resumed = train(tmp_path, resume=True, **options)
    validations = 12 * (3 - (cut - 1) // 3)
    assert len(Points.loaded) == 4 * (9 - cut) + validations
    assert_same_weights(whole(ITERS, sampler), resumed)


def test_mmengines_epochs_go_on_in_the_middle_too(tmp_path, whole):
    loop = dict(by_epoch=True, max_epochs=3)
    train(tmp_path, 5, loop=dict(loop), **EVERY_ITER)
    resumed = train(tmp_path, resume=True, loop=loop, **EVERY_ITER)
    assert_same_weights(whole(EPOCHS), resumed)


def test_another_number_of_batches_starts_the_epoch_anew(tmp_path, monkeypatch):
    train(tmp_path, 6, loop=dict(EPOCHS), **EVERY_ITER)
    monkeypatch.setattr(Points, '__len__', lambda self: 16)
    indices = Indices()
    options = dict(loop=dict(EPOCHS), hooks=(indices,), **EVERY_ITER)
    runner = make_runner(str(tmp_path), resume=True, **options)
    warnings = []
    runner.logger.warning = warnings.append
    runner.train()
    assert any('an epoch of 3 batches, and now there are 4' in x for x in warnings)
    assert indices.seen == [0, 1, 2, 3] * 2


def test_data_without_indices_are_left_to_mmengine(tmp_path):
    runner = make_runner(str(tmp_path), loop=dict(ITERS), interval=-1, by_epoch=False)
    runner._train_dataloader = dict(
        batch_size=4, dataset=Stream(), sampler=None, num_workers=0
    )
    runner._train_loop = dict(ITERS, max_iters=2)
    runner.train()
    assert runner.iter == 2
