"""The run loop of all suites: build, check, warm up, sample; a row for each call."""

import contextlib
import dataclasses
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from deform_gqa.profiling.memory import PeakMemory, quick_collections
from deform_gqa.profiling.timing import Timing

from .cases import Case, NotRun, Workload
from .errors import one_line
from .flops import count_flops
from .options import MeasureOptions, use_threads
from .progress import progress
from .report import Row
from .sampling import Timer

LATE = 'the time limit was reached'


@dataclasses.dataclass
class Task:
    """One call that is warm, and the row that it will fill."""

    case: Case
    workload: Workload
    row: Row

    @property
    def call(self) -> Callable[[], Any]:
        return self.workload.calls[self.row.direction]


# From warm tasks and a number of samples to their rows.
Sampler = Callable[[Timer, Sequence[Task], int], list[Row]]


def sample_in_turns(timer: Timer, tasks: Sequence[Task], count: int) -> list[Row]:
    """Time and peak memory; tasks together take turns, one sample of each a round.

    So a drift of the machine does not look like a trend over the cases.
    """
    rounds, size = (1, count) if len(tasks) == 1 else (count, 1)
    samples: list[list[float]] = [[] for _ in tasks]
    peaks = [PeakMemory(timer.device) for _ in tasks]
    for turn in range(rounds):
        for task, taken, peak in zip(tasks, samples, peaks, strict=True):
            with peak if turn == 0 else contextlib.nullcontext():
                taken += timer.sample(task.call, size)
    rows = []
    for task, taken, peak in zip(tasks, samples, peaks, strict=True):
        mib = peak.extra_mib
        if mib is not None:
            mib += task.workload.resident_mib
        timing = Timing(tuple(taken))
        rows.append(dataclasses.replace(task.row, timing=timing, peak_memory_mib=mib))
    return rows


@quick_collections()
def measure(
    groups: Sequence[Sequence[Case]],
    options: MeasureOptions,
    sampler: Sampler | None = sample_in_turns,
    counts_flops: bool = True,
) -> list[Row]:
    """Rows of every case, backend and direction.

    Args:
        groups: Cases that are built together and sampled in turns; most groups are
            one case.
        options: Backends, directions, sampling, time limit.
        sampler: Makes the rows of tasks that are warm; None to check them only.
        counts_flops: Count FLOPs and images where a case does not say its work.

    Raises:
        GateError: If a backend computes something wrong.
    """
    use_threads(options.threads)
    steps = len(groups) * len(options.backends) * len(options.directions)
    with progress(steps) as step:
        loop = _Loop(options, sampler, counts_flops, step)
        for group in groups:
            loop.run(group)
    return loop.rows


@dataclasses.dataclass
class _Loop:
    options: MeasureOptions
    sampler: Sampler | None
    counts_flops: bool
    step: Callable[[str], None]
    flops: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.timer = Timer(self.options.device, self.options.sampling)
        self.deadline = self.options.deadline()

    def run(self, group: Sequence[Case]) -> None:
        """One group with one backend after the other."""
        seen: set[tuple[str, str]] = set()
        for backend in self.options.backends:
            gc.collect()  # what the last backend held
            self._run_backend(group, backend, seen)

    def _run_backend(
        self, group: Sequence[Case], backend: str, seen: set[tuple[str, str]]
    ) -> None:
        built = []
        for case in group:
            try:
                workload = self._build(case, backend)
            except NotRun as reason:
                names = self.options.directions
                self._miss([_row(case, backend, name) for name in names], reason)
                continue
            # A model without our ops is the same with every backend.
            if (case.name, workload.backend) not in seen:
                seen.add((case.name, workload.backend))
                built.append((case, workload))
        for direction in self.options.directions:
            self.step(f'{group[0].name} {backend} {direction}')
            tasks = [
                Task(case, workload, _row(case, workload.backend, direction))
                for case, workload in built
            ]
            if self.deadline.is_past():
                self._miss([task.row for task in tasks], NotRun('skipped', LATE))
            elif self.sampler is None:
                self.rows += [task.row for task in tasks]
            else:
                self._sample(tasks, self.sampler)

    def _build(self, case: Case, backend: str) -> Workload:
        """Raises NotRun if it cannot run."""
        torch.manual_seed(0)  # the same weights for every backend
        with self._expected_failure():
            workload = case.build(backend)
        if 'params' in case.fields:
            case.fields['params'] = workload.params
        if workload.check is not None and not self.deadline.is_past():
            with self._expected_failure(workload):
                workload.check()
        return workload

    def _sample(self, tasks: Sequence[Task], sampler: Sampler) -> None:
        """Rows of those that run, and of those that fail at their first calls."""
        warm, counts = [], []
        for task in tasks:
            try:
                with self._expected_failure(task.workload):
                    self._count_work(task)
                    counts.append(self.timer.warm_up(task.call))
                warm.append(task)
            except NotRun as reason:
                self._miss([task.row], reason)
        if not warm:
            return
        try:
            with self._expected_failure(warm[0].workload):
                self.rows += sampler(self.timer, warm, statistics.median_high(counts))
        except NotRun as reason:
            self._miss([task.row for task in warm], reason)

    def _count_work(self, task: Task) -> None:
        """FLOPs where the case does not say its work; the same for all backends."""
        if task.row.work or not self.counts_flops:
            return
        key = (task.case.name, task.row.direction)
        if key not in self.flops:
            self.flops[key] = count_flops(task.call)
        work = {'flops': self.flops[key], 'images': task.case.images}
        task.row = dataclasses.replace(task.row, work=work)

    def _miss(self, rows: Sequence[Row], why: NotRun) -> None:
        missed = dict(status=why.status, reason=str(why))
        self.rows += [dataclasses.replace(row, **missed) for row in rows]

    def _expected_failure(self, workload: Workload | None = None):
        is_foreign = workload is not None and workload.is_foreign
        return expected_failure(self.options.amp_dtype, is_foreign)


def _row(case: Case, backend: str, direction: str) -> Row:
    return Row(case.name, backend, direction, **case.row_fields(direction))


@contextlib.contextmanager
def expected_failure(
    amp: torch.dtype | None, is_foreign: bool = False
) -> Iterator[None]:
    """Turns what may happen into NotRun; any other error is a defect, ends the run.

    Memory may run out; with mixed precision a kernel of someone else's may be missing;
    and a baseline may fail as it likes.
    """
    try:
        yield
    except RuntimeError as error:
        out_of_memory = (
            isinstance(error, torch.OutOfMemoryError)
            # The CPU's allocator has no class of its own.
            or 'DefaultCPUAllocator' in str(error)
        )
        if not (is_foreign or out_of_memory or _is_missing(error, amp)):
            raise
        raise NotRun('failed', one_line(error)) from error


def _is_missing(error: RuntimeError, amp: torch.dtype | None) -> bool:
    texts = ('not implemented for', 'same dtype', 'expected scalar type')
    return amp is not None and (
        isinstance(error, NotImplementedError)
        or any(text in str(error) for text in texts)
    )
