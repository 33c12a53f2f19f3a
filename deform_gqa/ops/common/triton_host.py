"""Host side that the launches of all kernels share."""

import functools
import math

import torch
from torch import Tensor

# The bias enters the kernels divided by the scale of the logits: scales below this
# go into q instead, so that the table keeps its range.
MIN_SCALE = 2.0**-6


def on_device_of_first_tensor(launcher):
    """Runs ``launcher`` with the GPU of its first argument as the current one."""

    @functools.wraps(launcher)
    def run(first, *args, **kwargs):
        with torch.cuda.device_of(first):
            return launcher(first, *args, **kwargs)

    return run


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as 80 or 90; 80 where there is no GPU (the interpreter)."""
    if device.type != 'cuda':
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def vector(*tensors: Tensor) -> int:
    """Longest vector, in elements, at whose multiples all rows (..., D) begin.

    At most 16 bytes; 1 where D is not contiguous, and where all strides are multiples
    of 16: Triton sees that itself, and telling it costs a few registers.
    """
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    if all(stride % 16 == 0 for stride in strides):
        return 1
    return math.gcd(16 // tensors[0].element_size(), *strides)


def split_scale(scale: float) -> tuple[float, float]:
    """(factor of q, positive factor of the logits); the former is 1 as a rule."""
    positive = max(abs(scale), MIN_SCALE)
    return scale / positive, positive
