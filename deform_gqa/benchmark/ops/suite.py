"""``benchmark.py op``: gate first, then time and memory of every case and backend."""

import argparse
import dataclasses
import functools
from typing import Any

from deform_gqa.profiling.environment import device_name

from ..core.cases import Case, Workload
from ..core.errors import GateError
from ..core.options import DTYPES
from ..core.report import Report, Row
from ..core.run import measure
from ..core.writer import publish
from .case import OpCase
from .gate import Gate
from .options import OpOptions, add_arguments, resolve
from .registry import OP_CASES
from .report import op_markdown, op_pictures
from .roofline import PEAKS, count_work, roofline
from .workload import build_workload

__all__ = ['add_arguments', 'run']

DESCRIPTION = 'Time and memory of the ops, at the shapes of their models.'


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print the tables, and write the files if --out is given.

    Raises:
        OptionError: For wrong options, before any work starts.
        GateError: If a backend computes wrongly; nothing is reported then.
    """
    options = resolve(args)
    gate = Gate(options.device, DTYPES[options.dtype])
    cases = [
        op_case(case, options, gate)
        for op in options.ops
        for case in OP_CASES[op].select(options)
    ]
    if options.gate_only:
        print(f'{check(cases, options)} comparisons with naive passed')
        return
    rows = in_order(measure([[case] for case in cases], options), cases, options)
    described = options.describe()
    report = Report.of('op', command, options.device, described, cases, rows)
    pictures = op_pictures(report)
    publish('op', report.to_json(), op_markdown(report), options.out, pictures)


def check(cases: list[Case], options: OpOptions) -> int:
    """Compares all with naive and times nothing; returns the number of comparisons.

    Raises:
        GateError: If one is wrong, or was not compared: that is no passed check.
    """
    options = dataclasses.replace(options, directions=options.directions[:1])
    rows = measure([[case] for case in cases], options, sampler=None)
    for row in rows:
        if row.status != 'ok':
            raise GateError(f'{row.backend} on {row.case} {row.status}: {row.reason}')
    return len(rows)


def in_order(rows: list[Row], cases: list[Case], options: OpOptions) -> list[Row]:
    """Backends side by side: by case, direction and backend."""
    names = [case.name for case in cases]

    def key(row: Row) -> tuple[int, int, int]:
        return (
            names.index(row.case),
            options.directions.index(row.direction),
            options.backends.index(row.backend),
        )

    return sorted(rows, key=key)


def op_case(case: OpCase, options: OpOptions, gate: Gate) -> Case:
    """The case as the run loop takes it."""
    device, dtype = options.device, DTYPES[options.dtype]

    def build(backend: str) -> Workload:
        workload = build_workload(case, device, dtype, backend)
        check = functools.partial(gate.check, case, backend)
        return dataclasses.replace(workload, check=check)

    def row_fields(direction: str) -> dict[str, Any]:
        work = count_work(case, dtype, direction)
        fields: dict[str, Any] = {'work': dataclasses.asdict(work)}
        peaks = PEAKS.get(device_name(device))
        if peaks is not None:
            fields['roofline_us'] = roofline(work, dtype, peaks)
        return fields

    return Case(case.name, case.describe(), case.batch, build, row_fields)
