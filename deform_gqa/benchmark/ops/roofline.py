"""The least work of a case, and the least time that it takes on known GPUs.

Work that no implementation can leave out: an exponential for each (query, key, head)
pair, the products of attention, every argument and result moved once. Backward
recomputes the weights instead of storing them. The bias costs more than nothing; it
is left out, as it depends on the method.

deform_sdpa and ms_deform_attn interpolate: four corners a sample, of a key and of a
value, or of a value alone. The corners that are gathered are counted, but give no
limit: they come from caches, and on small maps the products of whole maps do without
them.
"""

import dataclasses

import torch

from ..core.cases import FORWARD
from .case import OpCase
from .workload import DIRECTIONS

_CORNERS = 4  # of a sample, in each map
# Passes over the corners: gathered; then gathered again, and their gradients scattered.
_FORWARD_PASSES = 1
_BACKWARD_PASSES = 2


@dataclasses.dataclass(frozen=True)
class Work:
    """Counts of one call.

    Attributes:
        flops: Of the products of attention, and of the interpolation.
        bytes: Arguments and results, moved once.
        samples: Samples of each map that the op samples from.
        gathered_bytes: Corners read, and scattered to by the backward pass (in
            float32), if every sample is interpolated from vectors.
    """

    pairs: int
    exps: int
    flops: int
    bytes: int
    samples: int = 0
    gathered_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What a device does at best, a second."""

    exps: float
    half_flops: float
    single_flops: float
    bytes: float

    def flops(self, dtype: torch.dtype) -> float:
        return self.single_flops if dtype == torch.float32 else self.half_flops


# Published figures of the SXM modules at boost clock. Exponentials: 16 a clock and
# multiprocessor. Single precision: three TF32 products make one of full precision.
_H100 = Peaks(exps=3.86e12, half_flops=989e12, single_flops=165e12, bytes=3.35e12)
PEAKS = {
    'NVIDIA H100 80GB HBM3': _H100,
    'NVIDIA H200': dataclasses.replace(_H100, bytes=4.8e12),
}


def _bytes(case: OpCase, dtype: torch.dtype, direction: str) -> int:
    sizes = case.input_bytes(dtype)
    inputs, out = sum(sizes.values()), case.output_bytes(dtype)
    if direction == FORWARD:
        return inputs + out
    # Forward, then backward reads the inputs and the gradient of out, and writes the
    # gradients of the inputs.
    moved = (inputs + out) + (2 * inputs + out)
    if case.has_softmax:  # the sums are written, and read again with out
        log_sum_exp = case.batch * case.num_heads * case.num_queries * 4
        moved += out + 2 * log_sum_exp
    return moved


def count_work(case: OpCase, dtype: torch.dtype, direction: str) -> Work:
    """Counts of a call.

    Raises:
        ValueError: If ``direction`` is not one of DIRECTIONS.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f'direction must be one of {DIRECTIONS}, got {direction!r}')
    products, passes = case.products[0], _FORWARD_PASSES
    exps = case.pairs if case.has_softmax else 0
    corner_values = _CORNERS * case.sampled_maps * case.head_dim * case.samples
    gathered = corner_values * dtype.itemsize
    if direction != FORWARD:
        products += case.products[1]
        exps *= 2
        passes += _BACKWARD_PASSES
        gathered = 2 * gathered + 4 * corner_values
    return Work(
        pairs=case.pairs,
        exps=exps,
        flops=2 * products * case.head_dim * case.pairs + 2 * passes * corner_values,
        bytes=_bytes(case, dtype, direction),
        samples=case.samples,
        gathered_bytes=gathered,
    )


def roofline(work: Work, dtype: torch.dtype, peaks: Peaks) -> dict[str, float]:
    """Least times of ``work`` on a device by limit, in microseconds."""
    return {
        'exp': work.exps / peaks.exps * 1e6,
        'tensor': work.flops / peaks.flops(dtype) * 1e6,
        'memory': work.bytes / peaks.bytes * 1e6,
    }
