import random

import numpy as np
import pytest
import torch

from deform_gqa.engine.rng_state import get_rng_state, set_rng_state


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(()).item(),
    ]


def test_draws_come_again():
    random.gauss(0, 1)  # each keeps its second normal number for the next call
    np.random.randn()
    state = get_rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


def test_state_survives_a_weights_only_file(tmp_path):
    state = get_rng_state()
    first = draw()
    torch.save(state, tmp_path / 'state.pth')
    set_rng_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert draw() == first


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
def test_cuda_draws_come_again():
    state = get_rng_state()
    first = torch.rand(5, device='cuda')
    state = {
        key: getattr(value, 'cuda', lambda v=value: v)() for key, value in state.items()
    }  # as a checkpoint loaded onto the training device
    set_rng_state(state)
    assert torch.equal(torch.rand(5, device='cuda'), first)
