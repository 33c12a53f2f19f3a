"""Drawn inputs and helpers of the Triton tests: small, as the interpreter is slow."""

import contextlib
import functools
from unittest import mock

import torch
from torch import Tensor

from deform_gqa.ops.common import block_sizes
from deform_gqa.ops.common.block_sizes import BlockSizes
from deform_gqa.ops.common.triton_host import launches_anew

# Small tiles, so that small inputs have several of them, and the usual ones.
SIZES = [
    BlockSizes(queries=32, keys=16, warps=2, stages=1),
    BlockSizes(queries=128, keys=16, warps=4, stages=1),
    BlockSizes(queries=256, keys=32, warps=8, stages=1),
]


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
        mock.patch.object(
            Tensor, 'new_empty_strided', poisoned(Tensor.new_empty_strided)
        ),
    ):
        yield


@contextlib.contextmanager
def tile_sizes(sizes: BlockSizes):
    with (
        mock.patch.object(block_sizes, 'tabled_sizes', lambda *args: sizes),
        launches_anew(),
    ):
        yield


def to_double(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.detach().double().requires_grad_() for x in inputs]


def assert_as_good_as(
    actual: list[Tensor],
    naive: list[Tensor],
    exact: list[Tensor],
    atol: float,
    loss_scale: float = 1.0,
) -> None:
    """At most twice the error of ``naive`` in the same precision.

    ``atol`` is relative to the largest exact value, or to 1: naive may be lucky where
    a tensor has few elements, and exact where a gradient vanishes (a single key).
    Elements that overflow in naive itself, or nearly so, may be anything; gradients
    have been divided by ``loss_scale``.
    """
    for i, (a, n, e) in enumerate(zip(actual, naive, exact, strict=True)):
        assert a.shape == e.shape and a.dtype == n.dtype
        allowed = atol * e.abs().max().clamp(min=1)
        limit = torch.finfo(n.dtype).max / 2 / loss_scale
        finite = n.isfinite() & (e.abs() < limit)
        a, n, e = a[finite].double(), n[finite].double(), e[finite]
        if not e.numel():
            continue
        error = (a - e).abs().max()
        allowed += 2 * (n - e).abs().max()
        assert error <= allowed, f'tensor {i}: error {error:.2e}, allowed {allowed:.2e}'
