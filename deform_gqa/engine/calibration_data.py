"""Images that a trained model is run on when its heads are merged."""

from collections.abc import Iterator

import numpy as np
from mmengine.dataset import pseudo_collate
from torch.utils.data import Dataset

from deform_gqa.engine.rng_state import seeded

__all__ = ['calibration_batches']


def calibration_batches(dataset: Dataset, count: int, seed: int) -> Iterator[dict]:
    """``count`` images from all over a data set, each a batch.

    The random transforms are the same in every process and on every call, and the
    random states of this process do not change.

    Args:
        dataset: Of mmengine, with its pipeline.
        count: Number of images; no more than the data set has.
        seed: Non-negative.
    """
    count = min(count, len(dataset))
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        with seeded(seed, index):
            sample = dataset[index]
        yield pseudo_collate([sample])
