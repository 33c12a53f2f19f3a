"""Batches of a data loader whose order and random numbers can be taken up anywhere.

A data loader as such can only start at its first batch, and what its workers draw
depends on all the batches that they have loaded before. Here every batch brings a seed
of its own, made of the seed of the run, the rank and the number of the iteration, so
that a batch is the same whether or not those before it were loaded, and whichever
process loads it.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from mmengine.dataset import DefaultSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from deform_gqa.engine.rng_state import seeded

__all__ = ['ResumableBatchSampler', 'SeededBatch', 'resumable_batches']


@dataclass(frozen=True)
class SeededBatch:
    """Indices of a batch; the process that iterates over them is seeded meanwhile.

    A data loader does so where it loads the items: in a worker or in the main process,
    whose random states are thus left to the model.
    """

    indices: Sequence[int]
    key: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        with seeded(*self.key):
            yield from self.indices


class ResumableBatchSampler(Sampler[SeededBatch]):
    """The batches of another batch sampler, from any of them on.

    Args:
        batches (BatchSampler): Yields lists of indices.

    Attributes:
        key: What the seeds of the batches begin with.
        done: How many batches the next iteration leaves out, without loading them.
    """

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches
        self.key: tuple[int, ...] = ()
        self.done = 0
        self._first_iter = 0
        self._first_epoch: int | None = None

    def __getattr__(self, name: str):
        """``sampler``, ``batch_size`` and the like, as the other has them."""
        if name == 'batches':  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        """Batches of an epoch, also of one that begins in its middle."""
        return len(self.batches)

    def start_epoch(self, iteration: int, done: int = 0) -> None:
        """Prepares an epoch.

        Args:
            iteration (int): Iterations of the run before this epoch.
            done (int): Batches of this epoch to leave out.
        """
        self._first_iter, self.done, self._first_epoch = iteration, done, None

    def start_without_end(self, iteration: int) -> None:
        """Prepares epoch after epoch in one iteration, from that of the run on.

        The epochs that are over cost nothing with mmengine's DefaultSampler. The stream
        of an infinite sampler is run through, without its data.

        Raises:
            ValueError: There is no batch in an epoch.
        """
        if len(self) == 0:
            raise ValueError(
                f'the data set of {len(self.sampler)} items has no batch of '
                f'{self.batch_size}'
            )
        epoch, done = 0, iteration
        if isinstance(self.sampler, DefaultSampler):
            epoch, done = divmod(iteration, len(self))
        self._first_iter, self.done, self._first_epoch = iteration - done, done, epoch

    def _epochs(self) -> Iterator[Iterable]:
        if self._first_epoch is None:
            yield self.batches
            return
        for epoch in itertools.count(self._first_epoch):
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            yield self.batches

    def __iter__(self) -> Iterator[SeededBatch]:
        batches = itertools.chain.from_iterable(self._epochs())
        numbered = enumerate(batches, self._first_iter)
        for number, indices in itertools.islice(numbered, self.done, None):
            yield SeededBatch(indices, (*self.key, number))


def resumable_batches(loader: DataLoader) -> ResumableBatchSampler | None:
    """The batch sampler of a loader, replaced by a resumable one around it.

    Returns:
        ResumableBatchSampler or None: None if the loader has no batch sampler, or
        a data set without indices.
    """
    batches = loader.batch_sampler
    if batches is None or isinstance(loader.dataset, IterableDataset):
        return None
    if not isinstance(batches, ResumableBatchSampler):
        batches = ResumableBatchSampler(batches)
        # A loader reads it when an iteration starts, but refuses to have it set.
        object.__setattr__(loader, 'batch_sampler', batches)
        # Else every iteration draws a seed from torch's own generator as it starts.
        loader.generator = torch.Generator()
    return batches
