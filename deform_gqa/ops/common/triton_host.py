"""Host side that the launches of all kernels share."""

import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The bias enters the kernels divided by the scale of the logits: scales below this
# go into q instead, so that the table keeps its range.
MIN_SCALE = 2.0**-6


# Calls whose launches are kept: their block sizes, grids and constants follow from
# shapes, strides and options alone, and take longer to find than to launch.
CACHED_CALLS = 512


class Layout(NamedTuple):
    """What launches depend on of a tensor; unlike the tensor, it can be looked up."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def layout(x: Tensor) -> Layout:
    return Layout(x.shape, x.stride(), x.dtype)


def optional_layout(x: Tensor | None) -> Layout | None:
    return None if x is None else layout(x)


_cached_calls = []


def cached_call(function):
    """Decorator of what finds the launches of a call from layouts and options."""
    cached = functools.lru_cache(CACHED_CALLS)(function)
    _cached_calls.append(cached)
    return cached


@contextlib.contextmanager
def launches_anew():
    """For those who change block sizes: calls inside share no launches with others."""
    for cached in _cached_calls:
        cached.cache_clear()
    try:
        yield
    finally:
        for cached in _cached_calls:
            cached.cache_clear()


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch but for its tensors: grid, strides, and what is passed by name."""

    grid: tuple[int, ...]
    strides: tuple[int, ...]
    options: dict[str, Any]

    def __call__(self, kernel, *tensors: Tensor | None, **options):
        kernel[self.grid](*tensors, *self.strides, **self.options, **options)


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


def vector(*tensors: Layout) -> int:
    """Longest vector, in elements, at whose multiples all rows (..., D) begin.

    At most 16 bytes; 1 where D is not contiguous, and where all strides are multiples
    of 16: Triton sees that itself, and telling it costs a few registers.
    """
    strides = [stride for x in tensors for stride in x.strides[:-1]]
    if all(stride % 16 == 0 for stride in strides):
        return 1
    return math.gcd(16 // tensors[0].dtype.itemsize, *strides)


def split_scale(scale: float) -> tuple[float, float]:
    """(factor of q, positive factor of the logits); the former is 1 as a rule."""
    positive = max(abs(scale), MIN_SCALE)
    return scale / positive, positive
