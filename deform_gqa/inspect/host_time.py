"""Time that the host needs for a call of the Triton backend, launches taken out.

``triton.runtime.jit.JITFunction.run`` is replaced by a function that counts: what is
measured is checks, dispatch, autograd, allocations and the preparation of launches. The
tensors are small and on the CPU, where torch's few other ops of a call (sums of partial
gradients) are done at once; on a GPU each would be a launch.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from deform_gqa.ops import deform_attn, deform_sample, deform_sdpa, neighborhood_attn
from deform_gqa.ops.common import backends

GRID_SIZE = (6, 8)
BATCH, HEADS, HEAD_DIM, KEYS, CHANNELS, GROUPS = 1, 8, 32, 12, 64, 4


@dataclasses.dataclass
class HostTime:
    """Microseconds of a forward with gradients and of a backward; launches of each."""

    op: str
    forward_us: float
    backward_us: float
    forward_p5_us: float
    backward_p5_us: float
    forward_launches: int
    backward_launches: int


def _leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def calls() -> Iterator[tuple[str, Callable[[], Tensor], tuple[Tensor, ...]]]:
    """(op, call, inputs with gradients) of every op with kernels."""
    options = dict(grid_size=GRID_SIZE, backend='triton')
    queries = GRID_SIZE[0] * GRID_SIZE[1]
    q = _leaf(BATCH, HEADS, queries, HEAD_DIM)
    k, v = (_leaf(BATCH, HEADS, KEYS, HEAD_DIM) for _ in range(2))
    pos = (torch.rand(BATCH, GROUPS, KEYS, 2) * 2 - 1).requires_grad_()
    table = _leaf(HEADS, 5, 5, dtype=torch.float32)
    inputs = q, k, v, pos, table
    yield 'deform_attn', lambda: deform_attn(*inputs, **options), inputs
    x = _leaf(BATCH, CHANNELS, *GRID_SIZE)
    yield 'deform_sample', lambda: deform_sample(x, pos, backend='triton'), (x, pos)
    k_map, v_map = (_leaf(BATCH, HEADS, queries, HEAD_DIM) for _ in range(2))
    rpb = _leaf(HEADS, 5, 5, dtype=torch.float32)
    near = q, k_map, v_map, rpb
    yield (
        'neighborhood_attn',
        lambda: neighborhood_attn(*near, kernel_size=3, **options),
        near,
    )
    views = [_leaf(BATCH, n, HEADS, queries, HEAD_DIM) for n in (1, 3, 3)]
    coords = torch.rand(BATCH, 1, queries, 3, 4, 2).requires_grad_()
    points = *views, coords
    yield 'deform_sdpa', lambda: deform_sdpa(*points, **options), points


def measure(repeats: int) -> list[HostTime]:
    """Medians and 5th percentiles over ``repeats`` pairs of forward and backward."""
    launches = []

    def run(self, *args, **kwargs):
        launches.append(self.__name__)

    with (
        mock.patch.object(JITFunction, 'run', run),
        mock.patch.object(backends, '_device_reason', lambda device: None),
    ):
        return [_measure(*call, repeats, launches) for call in calls()]


def _measure(
    op: str,
    call: Callable[[], Tensor],
    inputs: tuple[Tensor, ...],
    repeats: int,
    launches: list[str],
) -> HostTime:
    grad = torch.randn_like(call())
    times = [], []
    for _ in range(repeats + repeats // 10):
        launches.clear()
        start = time.perf_counter()
        out = call()
        middle, forward = time.perf_counter(), len(launches)
        resumed = time.perf_counter()
        torch.autograd.grad(out, inputs, grad)
        end, backward = time.perf_counter(), len(launches) - forward
        times[0].append((middle - start) * 1e6)
        times[1].append((end - resumed) * 1e6)
    warm = [sorted(x[repeats // 10 :]) for x in times]
    return HostTime(
        op,
        *(round(x[len(x) // 2], 1) for x in warm),
        *(round(x[len(x) // 20], 1) for x in warm),
        forward,
        backward,
    )
