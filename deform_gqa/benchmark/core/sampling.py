"""Wall-clock samples of a call: every sample is kept, medians come later.

Not ``triton.testing.do_bench`` nor ``torch.utils.benchmark``: they choose the number of
samples, or warm up at each call, and here cases take turns, one sample of each. Tests
hold the times against those of ``torch.utils.benchmark``.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

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


class Timer:
    """Warms a call up and samples it on one device, 'cpu' or 'cuda'."""

    def __init__(self, device: torch.device, sampling: Sampling):
        self.device = device
        self.sampling = sampling
        self.cache: torch.Tensor | None = None
        if device.type == 'cuda':
            self.cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)

    def warm_up(self, call: Callable[[], Any]) -> int:
        """Calls at least once, for a share of the time; how many samples to take."""
        seconds = self.sampling.min_time_s * WARM_UP_SHARE
        start = time.perf_counter()
        while True:
            before = time.perf_counter()
            call()
            if self.cache is not None:
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            if now - start >= seconds:
                return self.sampling.count(now - before)

    def sample(self, call: Callable[[], Any], count: int) -> list[float]:
        """Milliseconds of each of ``count`` calls, one after the other."""
        if self.cache is not None:
            return _sample_cuda(call, count, self.cache)
        samples = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e3)
        return samples


def _sample_cuda(
    call: Callable[[], Any], count: int, cache: torch.Tensor
) -> list[float]:
    """Between CUDA events, the L2 cache flushed before each call."""
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)
    ]
    for start, end in events:
        cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(cache.device)
    return [start.elapsed_time(end) for start, end in events]
