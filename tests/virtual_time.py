"""Time that passes only while something naps, so that timing tests are exact.

Stands in for the module ``time`` in modules that measure.
"""

import pytest
import torch


class VirtualTime:
    def __init__(self) -> None:
        self.now_s = 0.0

    def nap(self, nap_ms: float) -> None:
        self.now_s += nap_ms / 1e3

    def perf_counter(self) -> float:
        return self.now_s

    monotonic = time = perf_counter


CLOCK = VirtualTime()


class Nap(torch.autograd.Function):
    """The identity, asleep in the directions asked for."""

    @staticmethod
    def forward(ctx, x, forward_ms, backward_ms):
        ctx.backward_ms = backward_ms
        CLOCK.nap(forward_ms)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        CLOCK.nap(ctx.backward_ms)
        return grad.clone(), None, None


def use_virtual_time(monkeypatch: pytest.MonkeyPatch, *modules) -> None:
    """Lets modules that imported ``time`` see the virtual one until a test ends."""
    for module in modules:
        monkeypatch.setattr(module, 'time', CLOCK)
