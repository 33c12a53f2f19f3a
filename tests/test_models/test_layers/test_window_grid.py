"""Tests of the cutting of maps into windows."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from deform_gqa.models.layers.window_grid import WindowGrid

WINDOW = (3, 4)


def windows_by_views(x, shift):
    """(B, rows, cols, h * w, C) by padding, rolling and permuting."""
    height, width = WINDOW
    pad_h, pad_w = -x.shape[1] % height, -x.shape[2] % width
    x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    x = x.roll([-s for s in shift], (1, 2))
    x = x.unflatten(2, (-1, width)).unflatten(1, (-1, height))
    return x.transpose(2, 3).flatten(3, 4)


def make(size, shift, batch=2):
    torch.manual_seed(0)
    x = torch.randn(batch, *size, 5, dtype=torch.float64)
    return x, WindowGrid(batch, size, WINDOW, shift, x.device)


@pytest.mark.parametrize('size', [(6, 8), (7, 9), (3, 4), (2, 3), (3, 13), (10, 2)])
class TestWindowGrid:
    def test_one_kind_without_shift(self, size):
        x, grid = make(size, (0, 0))
        expected = windows_by_views(x, (0, 0)).flatten(0, 2)
        assert grid.counts == [len(expected)]
        assert_close(grid.gather(x), expected)

    def test_four_kinds_with_shift(self, size):
        x, grid = make(size, (2, 1))
        windows = windows_by_views(x, (2, 1))
        kinds = [
            part.flatten(0, 2)
            for band in (windows[:, :-1], windows[:, -1:])
            for part in (band[:, :, :-1], band[:, :, -1:])
        ]
        assert grid.counts == [len(kind) for kind in kinds]
        assert_close(grid.gather(x), torch.cat(kinds))

    @pytest.mark.parametrize('shift', [(0, 0), (2, 1)])
    def test_there_and_back(self, size, shift):
        x, grid = make(size, shift)
        x.requires_grad_(True)
        assert_close(grid.scatter(grid.gather(x)), x, rtol=0, atol=0)
        windows = torch.randn_like(grid.gather(x)).requires_grad_(True)
        torch.autograd.gradcheck(grid.gather, (x,), fast_mode=True)
        torch.autograd.gradcheck(grid.scatter, (windows,), fast_mode=True)


def test_gradients_are_deterministic():
    x, grid = make((7, 9), (2, 1))
    x.requires_grad_(True)
    torch.use_deterministic_algorithms(True)
    try:
        grid.scatter(grid.gather(x).square()).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(x.grad, 2 * x.detach())
