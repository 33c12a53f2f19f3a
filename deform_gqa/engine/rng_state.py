"""The states of all random number generators of a process, as plain values.

Everything returned here passes torch's weights-only unpickler.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ['get_rng_state', 'seeded', 'set_rng_state']


def get_rng_state() -> dict:
    """The generators of Python, NumPy, torch and the current CUDA device.

    Returns:
        dict: ``python`` (nested tuple), ``numpy`` (tuple whose second entry is a
        list of int), ``torch`` (uint8 tensor) and, with CUDA, ``cuda`` (uint8
        tensor on the CPU).
    """
    name, keys, *rest = np.random.get_state()
    state = dict(
        python=random.getstate(),
        numpy=(name, keys.tolist(), *rest),
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Sets all generators to what :func:`get_rng_state` returned.

    Args:
        state (dict): The tensors may be on any device. Without ``cuda`` the
            generator of the CUDA device is left as it is.
    """
    random.setstate(state['python'])
    name, keys, *rest = state['numpy']
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    # A checkpoint is loaded onto the training device; generators want CPU tensors.
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds the CPU's generators for a while; they then go on where they were.

    Generators of CUDA devices are left alone, so that it works in a forked process.

    Args:
        key: Non-negative integers. Other keys give other random numbers.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
