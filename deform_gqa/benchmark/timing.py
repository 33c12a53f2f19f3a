"""Wall-clock samples of a call: every sample is kept, medians come later."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from deform_gqa.profiling.timing import Timing

MIN_SAMPLES = 3
MAX_SAMPLES = 200
# A share of the sampling time goes into warming caches and clocks up.
WARM_UP_SHARE = 0.2
# More than the last-level cache of any GPU so far; as triton.testing.do_bench does.
CACHE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How long to sample.

    Attributes:
        repeats: Number of samples; None for as many as fill ``min_time_s``, between
            3 and 200.
        min_time_s: Time to fill with samples.
    """

    repeats: int | None = None
    min_time_s: float = 1.0

    def __post_init__(self) -> None:
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f'repeats must be at least 1, got {self.repeats}')
        if not self.min_time_s > 0:
            raise ValueError(f'min_time_s must be positive, got {self.min_time_s}')

    def count(self, estimate_s: float) -> int:
        """Number of samples of a call that takes about ``estimate_s``."""
        if self.repeats is not None:
            return self.repeats
        wanted = math.ceil(self.min_time_s / max(estimate_s, 1e-9))
        return min(max(wanted, MIN_SAMPLES), MAX_SAMPLES)


def synchronize(device: torch.device) -> None:
    """Wait for the work of a CUDA device; CPUs have none outstanding."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def warm_up(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Call at least once, for ``seconds``; returns the seconds of the last call."""
    start = time.perf_counter()
    while True:
        before = time.perf_counter()
        call()
        synchronize(device)
        now = time.perf_counter()
        if now - start >= seconds:
            return now - before


def sample_cpu(call: Callable[[], Any], count: int) -> Timing:
    """``count`` wall-clock samples of a call on the CPU."""
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return Timing(tuple(samples))


def sample_cuda(call: Callable[[], Any], count: int, cache: torch.Tensor) -> Timing:
    """``count`` samples between CUDA events, the L2 cache flushed before each."""
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)
    ]
    for start, end in events:
        cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(cache.device)
    return Timing(tuple(start.elapsed_time(end) for start, end in events))


class Timer:
    """Warms a call up and samples it on one device."""

    def __init__(self, device: torch.device, sampling: Sampling):
        self.device = device
        self.sampling = sampling
        self.cache: torch.Tensor | None = None
        if device.type == 'cuda':
            self.cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)

    def warm_up(self, call: Callable[[], Any]) -> int:
        """Returns the number of samples to take."""
        seconds = self.sampling.min_time_s * WARM_UP_SHARE
        return self.sampling.count(warm_up(call, self.device, seconds))

    def sample(self, call: Callable[[], Any], count: int) -> Timing:
        if self.cache is None:
            return sample_cpu(call, count)
        return sample_cuda(call, count, self.cache)
