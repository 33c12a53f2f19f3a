import pytest
import torch
from mmengine.fileio.backends import registry_utils
from mmengine.runner import CheckpointLoader


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are slower with more threads, and sums differ with their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_files(monkeypatch):
    """Undoes what a test registers with mmengine's loader and file backends."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    for known, key in (('backends', 'local'), ('prefix_to_backends', '')):
        known = getattr(registry_utils, known)
        monkeypatch.setitem(known, key, known[key])
