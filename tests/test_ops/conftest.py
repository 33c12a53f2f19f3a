"""What the op tests share; needs nothing but torch."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Uninitialised tensors hold nan, whichever function makes them."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
