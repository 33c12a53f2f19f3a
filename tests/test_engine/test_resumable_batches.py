import random
import time

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from deform_gqa.engine.resumable_batches import resumable_batches


class Draws(Dataset):
    """Each item holds its index and a number from each generator."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[float]:
        return [index, random.random(), np.random.rand(), torch.rand(()).item()]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def make_loader(sampler=DefaultSampler, workers: int = 0, dataset=None) -> DataLoader:
    dataset = Draws() if dataset is None else dataset
    loader = DataLoader(
        dataset,
        batch_size=4,
        sampler=sampler(dataset, seed=1),
        num_workers=workers,
        collate_fn=list,
    )
    resumable_batches(loader).key = (5, 0)
    return loader


def test_batches_do_not_depend_on_those_before_nor_on_the_workers():
    whole = list(make_loader())
    assert [len(batch) for batch in whole] == [4, 4, 2]
    for workers in (0, 1, 2):
        loader = make_loader(workers=workers)
        loader.batch_sampler.start_epoch(0, done=1)
        assert list(loader) == whole[1:]
        assert len(loader) == 3


def test_each_iteration_and_rank_has_numbers_of_its_own():
    loader = make_loader()
    first = next(iter(loader))
    loader.batch_sampler.start_epoch(3)
    second = next(iter(loader))
    loader.batch_sampler.key = (5, 1)
    third = next(iter(loader))
    assert [item[0] for item in first] == [item[0] for item in second]
    numbers = {tuple(item[1:]) for batch in (first, second, third) for item in batch}
    assert len(numbers) == 12


def test_main_process_keeps_its_random_states():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    state = random.getstate()
    for batch in make_loader():
        assert batch
    assert torch.equal(torch.rand(3), expected)
    assert random.getstate() == state


@pytest.mark.parametrize('sampler', [DefaultSampler, InfiniteSampler])
@pytest.mark.parametrize('iteration', [0, 2, 3, 7])
def test_without_end(sampler, iteration):
    def take(start: int, number: int) -> list:
        loader = make_loader(sampler)
        loader.batch_sampler.start_without_end(start)
        batches = iter(loader)
        return [next(batches) for _ in range(number)]

    whole = take(0, 9)
    assert take(iteration, 9 - iteration) == whole[iteration:]
    orders = [[item[0] for item in batch] for batch in whole]
    assert orders[:3] != orders[3:6]


def test_a_long_way_takes_no_time_and_loads_nothing(monkeypatch):
    monkeypatch.setattr(Draws, '__getitem__', lambda self, index: index)
    loader = make_loader(dataset=Draws(1000))
    loader.batch_sampler.start_without_end(10**9)
    started = time.process_time()
    next(iter(loader))
    assert time.process_time() - started < 0.5


def test_what_wraps_a_sampler_shows_through():
    dataset = Draws()
    sampler = DefaultSampler(dataset, seed=1)
    loader = DataLoader(dataset, batch_sampler=BatchSampler(sampler, 4, True))
    batches = resumable_batches(loader)
    assert batches.sampler is sampler
    assert batches.batch_size == 4
    assert resumable_batches(loader) is batches
    assert len(loader) == 2


def test_loaders_that_cannot_be_resumed():
    assert resumable_batches(DataLoader(Stream(), batch_size=2)) is None
    assert resumable_batches(DataLoader(Draws(), batch_size=None)) is None


def test_no_batch_in_an_epoch():
    dataset = Draws(3)
    loader = DataLoader(dataset, batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match='of 3 items has no batch of 4'):
        resumable_batches(loader).start_without_end(0)
