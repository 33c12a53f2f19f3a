"""``benchmark.py op``: gate first, then time and memory of every case and backend."""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deform_gqa.profiling.environment import describe_environment
from deform_gqa.profiling.memory import PeakMemory

from . import panels, plots, tables
from .common_options import DTYPES
from .errors import GateError, one_line
from .floors import Floor, count_work, device_peaks, floor_time
from .gate import Gate
from .op_cases import CASES, OpCase, select_cases
from .op_options import OpOptions, add_arguments, resolve
from .op_peers import (
    PEERS,
    Call,
    inputs_of,
    make_call,
    out_of_memory_reason,
    unsupported_reason,
)
from .progress import progress
from .report import Report, Row, Status
from .sdpa_cases import OP as SDPA
from .sdpa_cases import sdpa_cases
from .timing import Timer

__all__ = ['add_arguments', 'run']

DESCRIPTION = 'Time and memory of the ops, at the shapes of their models.'


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print the tables, and write the files if --out is given.

    Raises:
        OptionError: For wrong options, before any work starts.
        GateError: If a backend computes wrongly; nothing is reported then.
    """
    options = resolve(args)
    options.use_threads()
    suite = OpSuite(options)
    suite.check()
    if options.gate_only:
        suite.require_all_checked()
        print(f'{suite.checks} comparisons with naive passed')
        return
    report = Report(
        suite='op',
        command=command,
        environment=describe_environment(options.device),
        options=options.describe(),
        cases=[case.describe() for case in suite.cases],
        rows=suite.measure(),
    )
    markdown = tables.op_markdown(report)
    print(markdown)
    if options.out is not None:
        write(report, markdown, Path(options.out))


def write(report: Report, markdown: str, out_dir: Path) -> None:
    """op.json, op.md and a PNG an op."""
    report.save(out_dir / 'op.json')
    (out_dir / 'op.md').write_text(markdown)
    reason = panels.unavailable_reason()
    paths = plots.save_op_figures(report, out_dir) if reason is None else []
    names = ['op.json', 'op.md', *(path.name for path in paths)]
    print(f'written to {out_dir}: {", ".join(names)}')
    if reason is not None:
        print(reason)


class OpSuite:
    """All cases and backends of one run."""

    def __init__(self, options: OpOptions):
        self.options = options
        self.device = options.device
        self.dtype = DTYPES[options.dtype]
        self.cases: list[OpCase] = select_cases(
            [op for op in options.ops if op in CASES],
            options.sizes,
            options.stages,
            options.batch_sizes,
            options.kv_heads,
        )
        if SDPA in options.ops:
            self.cases += sdpa_cases(options.sdpa, options.kv_heads)
        # (case, backend) -> status and reason of those that will not be timed
        self.barred: dict[tuple[OpCase, str], tuple[Status, str]] = {}
        self.checks = 0
        self._deadline = None
        if options.time_limit_s is not None:
            self._deadline = time.monotonic() + options.time_limit_s

    def check(self) -> None:
        """Find what cannot run, and compare all others with naive."""
        gate = Gate(self.device, self.dtype)
        pairs = [(case, name) for case in self.cases for name in self.options.backends]
        with progress(len(pairs)) as step:
            for case, backend in pairs:
                step(f'checking {case.name} {backend}')
                status, reason = self._status(case, backend)
                if reason is None:
                    check = functools.partial(gate.check, case, backend)
                    status, reason = 'failed', self._attempt(backend, check)
                if reason is None:
                    self.checks += 1
                else:
                    self.barred[case, backend] = (status, reason)

    def require_all_checked(self) -> None:
        """A check that did not happen is no passed check.

        Raises:
            GateError: If a case was not compared, with the first reason.
        """
        for (case, backend), (status, reason) in self.barred.items():
            raise GateError(f'{backend} on {case.name} {status}: {reason}')

    def measure(self) -> list[Row]:
        """A row for each case, direction and backend."""
        plan = [
            (case, direction, backend)
            for case in self.cases
            for direction in self.options.directions
            for backend in self.options.backends
        ]
        timer = Timer(self.device, self.options.sampling)
        rows = []
        with progress(len(plan)) as step:
            for case, direction, backend in plan:
                step(f'{case.name} {backend} {direction}')
                rows.append(self._row(timer, case, backend, direction))
        return rows

    def _row(self, timer: Timer, case: OpCase, backend: str, direction: str) -> Row:
        row = self._empty_row(case, backend, direction)
        status, reason = self._status(case, backend)
        if reason is not None:
            return dataclasses.replace(row, status=status, reason=reason)
        measured: list[Row] = []
        failure = self._attempt(
            backend, lambda: measured.append(self._measure(timer, case, row))
        )
        if failure is not None:
            return dataclasses.replace(row, status='failed', reason=failure)
        return measured[0]

    def _status(self, case: OpCase, backend: str) -> tuple[Status, str | None]:
        """('ok', None), or why the case will not be run."""
        if (case, backend) in self.barred:
            return self.barred[case, backend]
        reason = unsupported_reason(case, backend, self.device, self.dtype)
        if reason is not None:
            return 'unsupported', reason
        if self._is_late():
            return 'skipped', 'the time limit was reached'
        reason = out_of_memory_reason(case, backend, self.device)
        return ('ok', None) if reason is None else ('skipped', reason)

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _empty_row(self, case: OpCase, backend: str, direction: str) -> Row:
        work = count_work(case, self.dtype, direction)
        peaks = device_peaks(describe_device(self.device))
        floor = None if peaks is None else floor_time(work, self.dtype, peaks)
        return Row(
            case=case.name,
            backend=backend,
            direction=direction,
            work=dataclasses.asdict(work),
            floor_us=None if floor is None else floor_by_limit(floor),
        )

    def _measure(self, timer: Timer, case: OpCase, row: Row) -> Row:
        inputs = case.make_inputs(self.device, self.dtype)
        inputs = inputs_of(row.backend, inputs)
        call = timed_call(make_call(case, row.backend), inputs, row.direction)
        count = timer.warm_up(call)
        with PeakMemory(self.device) as memory:
            timing = timer.sample(call, count)
        return dataclasses.replace(row, timing=timing, peak_memory_mib=memory.extra_mib)

    @staticmethod
    def _attempt(backend: str, work: Callable[[], None]) -> str | None:
        """Run; the reason if memory runs out, or if a peer fails.

        Peers are other people's code: that they cannot do a case is a result. An
        error in one of our backends is a defect and ends the run.
        """
        expected = RuntimeError if backend in PEERS else torch.OutOfMemoryError
        try:
            work()
        except expected as error:
            return one_line(error)
        return None


def describe_device(device: torch.device) -> str:
    """Name by which the floors know a GPU."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'


def floor_by_limit(floor: Floor) -> dict[str, float]:
    """{'exp': us, 'tensor': us, 'memory': us}."""
    return {
        'exp': floor.exp_us,
        'tensor': floor.tensor_us,
        'memory': floor.memory_us,
    }


def timed_call(
    call: Call, inputs: Mapping[str, Tensor], direction: str
) -> Callable[[], object]:
    """The function to time; it hands its results back, so that they are alive."""
    if direction == 'forward':

        @torch.no_grad()
        def forward() -> Tensor:
            return call(inputs)

        return forward
    grad_out = torch.randn_like(inputs['q'])
    leaves = [x for x in inputs.values() if x.requires_grad]

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(inputs), leaves, grad_out)

    return forward_backward
