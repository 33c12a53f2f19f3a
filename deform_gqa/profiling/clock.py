"""Points in time on the device that computes, for durations inside an iteration."""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import torch


class Clock:
    """Takes marks now and reads them later, so that taking one never waits.

    A CPU computes as it is told: a mark is the time of day.
    """

    def start(self) -> None:
        """Begins to count at zero."""
        self._start = self.mark()

    def mark(self, again: Any = None) -> Any:
        """This point in time; ``again`` is a mark that is moved here and handed back
        where the clock can do that."""
        return time.perf_counter()

    def read_ms(self, mark: Any) -> float:
        """Milliseconds from the start to a mark; after :meth:`synchronize`."""
        return (mark - self._start) * 1e3

    def synchronize(self) -> None:
        """Waits until all marks have been passed."""


class CudaClock(Clock):
    """A mark is an event on the current stream of the thread that takes it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self, again: torch.cuda.Event | None = None) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True) if again is None else again
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read_ms(self, mark: torch.cuda.Event) -> float:
        return self._start.elapsed_time(mark)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def make_clock(device: torch.device) -> Clock:
    """The clock of a device.

    Raises:
        ValueError: For a device of another type than 'cpu' and 'cuda'.
    """
    if device.type == 'cpu':
        return Clock()
    if device.type == 'cuda':
        return CudaClock(device)
    raise ValueError(f"device must be of type 'cpu' or 'cuda', got {str(device)!r}")


@dataclasses.dataclass
class Span:
    """From one mark of a clock to another; open while ``end`` is None."""

    start: Any
    end: Any = None


class Spans:
    """Spans of time that belong together."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._spans: list[Span] = []

    def begin(self) -> Span:
        """A new span from now on."""
        self._spans.append(Span(self._clock.mark()))
        return self._spans[-1]

    def end(self, span: Span) -> None:
        """Ends a span now, also one that has ended before."""
        span.end = self._clock.mark(span.end)

    def covered_ms(self) -> float:
        """Time that ended spans cover, where they overlap once."""
        read = self._clock.read_ms
        ended = (span for span in self._spans if span.end is not None)
        return covered((read(span.start), read(span.end)) for span in ended)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total = 0.0
    reached = float('-inf')
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
