"""The torch backend of deform_attn never holds an N x S x heads tensor."""

import dataclasses

import pytest
import torch

from deform_gqa.ops import deform_attn
from deform_gqa.ops.deform_attn import tiled as torch_impl
from deform_gqa.profiling.memory import PeakMemory, unmeasurable_reason

CPU = torch.device('cpu')
measurable = pytest.mark.skipif(
    unmeasurable_reason(CPU) is not None, reason=str(unmeasurable_reason(CPU))
)


@dataclasses.dataclass
class Call:
    """Shape and options of a call; heads of 32 channels."""

    batch: int
    heads: int
    grid_size: tuple[int, int]
    keys: int
    table_size: tuple[int, int] | None = None
    transposed: bool = False  # the strides that 1x1 convolutions give q, k and v
    dropout_p: float = 0.0

    def peak_mib(self) -> float:
        """Of forward and backward, beyond the inputs."""
        q, k, v = (
            self.draw(tokens)
            for tokens in (self.grid_size[0] * self.grid_size[1], self.keys, self.keys)
        )
        bias = ()
        if self.table_size is not None:
            pos = torch.rand(self.batch, 1, self.keys, 2) * 2 - 1
            bias = pos, torch.randn(self.heads, *self.table_size)
        options = dict(grid_size=self.grid_size, dropout_p=self.dropout_p)
        with PeakMemory(CPU) as peak:
            out = deform_attn(q, k, v, *bias, **options, backend='torch')
            out.sum().backward()
        return peak.extra_mib

    def draw(self, tokens: int) -> torch.Tensor:
        x = torch.randn(self.batch, self.heads, 32, tokens).transpose(2, 3)
        return (x if self.transposed else x.contiguous()).requires_grad_()


@pytest.fixture(scope='module')
def libraries_are_loaded():
    """What the first products of matrices load is no part of a measurement."""
    for table_size in (None, (5, 5)):
        Call(1, 2, (20, 20), 100, table_size, dropout_p=0.1).peak_mib()


@measurable
@pytest.mark.parametrize(
    ('call', 'most_mib'),
    [
        # Without a bias: a tensor of weights has 153 MiB, and torch would hold several.
        (Call(1, 2, (100, 200), 1000, transposed=True), 80),
        (Call(1, 2, (100, 200), 1000, dropout_p=0.1), 120),
        (Call(1, 2, (100, 200), 1000, transposed=True, dropout_p=0.1), 120),
        # A narrow map: taps of all its rows would take 1 GiB.
        (Call(1, 4, (10000, 1), 400, (13, 13)), 150),
        # Few queries and a fine table: windows of all keys would take 1 GiB.
        (Call(64, 16, (7, 7), 25, (111, 111)), 140),
        (Call(1, 8, (3, 5), 1000, (111, 111)), 140),
    ],
)
def test_peak(libraries_are_loaded, call, most_mib):
    assert call.peak_mib() < most_mib


@pytest.mark.parametrize('grid_size', [(7, 7), (1, 400), (400, 1), (30, 40), (2, 90)])
@pytest.mark.parametrize('table_size', [None, (1, 1), (13, 300), (300, 13)])
@pytest.mark.parametrize('keys', [1, 300, 5000])
def test_tiles_are_bounded(grid_size, table_size, keys):
    """In numbers: by constants, and where these do not suffice by the keys."""
    q = torch.empty(2, 8, grid_size[0] * grid_size[1], 1)
    k = torch.empty(2, 8, keys, 1)
    bias = None, None
    if table_size is not None:
        bias = torch.zeros(2, 1, keys, 2), torch.zeros(8, *table_size)
    problem = torch_impl._Problem(q, k, k, *bias, grid_size)
    pairs, rows, cols = problem._tile_shape()
    assert pairs * keys * rows * cols <= max(torch_impl.MAX_WEIGHTS, keys)
    largest = pairs * keys * problem._numbers(rows, cols)
    assert largest <= max(4 * torch_impl.MAX_WEIGHTS, 9 * keys)
