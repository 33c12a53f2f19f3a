"""Drawn inputs and helpers of the Triton tests: small, as the interpreter is slow."""

import contextlib
import functools
from unittest import mock

import torch
from cases import DeformAttnCase
from torch import Tensor

from deform_gqa.ops.triton_backend import problem
from deform_gqa.ops.triton_backend.block_sizes import BlockSizes
from deform_gqa.ops.triton_backend.patches import axis_of

# A position this close to a table cell, in cells, may be on either side of it in
# another precision, and bilinear interpolation has no derivative there.
MARGIN = 1e-4

# Small tiles, so that small inputs have several of them, and the usual ones.
SIZES = [
    BlockSizes(queries=32, keys=16, warps=2, stages=1),
    BlockSizes(queries=128, keys=16, warps=4, stages=1),
    BlockSizes(queries=256, keys=32, warps=8, stages=1),
]


def move_off_cells(case: DeformAttnCase, pos: Tensor) -> None:
    """Moves positions, in place, until no query is within MARGIN of a table cell."""
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for axis in range(2):
            size = case.grid_size[axis]
            map_axis = axis_of(size, case.table_size[axis])
            at = pos[..., axis]
            for _ in range(100):
                t = map_axis.base + (1 - at.double()) * map_axis.half
                t = t.unsqueeze(-1) + torch.arange(size) * map_axis.step
                near = ((t - t.round()).abs() < MARGIN).any(-1) & (map_axis.half > 0)
                if not near.any():
                    break
                nudge = torch.rand(at.shape, generator=generator) * 0.01
                at.copy_(torch.where(near, at * (1 - nudge), at))


def draw_inputs(case: DeformAttnCase, dtype: torch.dtype) -> list[Tensor | None]:
    inputs = case.inputs(dtype)
    if inputs[3] is not None:
        move_off_cells(case, inputs[3])
    return inputs


def poisoned(function):
    """``function``, an allocation, with every float of the result NaN."""

    @functools.wraps(function)
    def allocate(*args, **kwargs):
        x = function(*args, **kwargs)
        return x.fill_(float('nan')) if x.is_floating_point() else x

    return allocate


@contextlib.contextmanager
def poisoned_memory():
    """What a kernel leaves unwritten is NaN."""
    with (
        mock.patch.object(torch, 'empty', poisoned(torch.empty)),
        mock.patch.object(torch, 'empty_like', poisoned(torch.empty_like)),
        mock.patch.object(Tensor, 'new_empty', poisoned(Tensor.new_empty)),
    ):
        yield


@contextlib.contextmanager
def tile_sizes(sizes: BlockSizes):
    with mock.patch.object(problem, 'block_sizes', lambda *args: sizes):
        yield


def to_double(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.detach().double().requires_grad_() for x in inputs]


def assert_as_good_as(
    actual: list[Tensor], naive: list[Tensor], exact: list[Tensor], atol: float
) -> None:
    """At most twice the error of ``naive`` in the same precision.

    ``atol`` is relative to the largest exact value, or to 1: naive may be lucky where
    a tensor has few elements, and exact where a gradient vanishes (a single key).
    """
    for i, (a, n, e) in enumerate(zip(actual, naive, exact, strict=True)):
        assert a.shape == e.shape and a.dtype == n.dtype
        error = (a.double() - e).abs().max()
        allowed = 2 * (n.double() - e).abs().max() + atol * e.abs().max().clamp(min=1)
        assert error <= allowed, f'tensor {i}: error {error:.2e}, allowed {allowed:.2e}'
