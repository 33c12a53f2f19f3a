"""What the suites of models have in common: cases to rows, tables, pictures, files."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from deform_gqa.profiling.markdown import number, records_table

from ..core import figures
from ..core.cases import Case, Workload
from ..core.kv_heads import Heads
from ..core.report import Report, Row
from ..core.run import measure
from ..core.tables import document, measured_cells, missing_lines
from ..core.writer import publish
from .options import ModelOptions
from .workload import Agreement

_HIDDEN = ('name', 'params')  # of a case: not columns of their own
_NOTES = (
    'Medians over the samples; memory is the peak during a call over the use before '
    'it. {} FLOPs are two for each multiply-add of convolutions, linear layers and '
    'attention products.'
)


def model_case(
    fields: dict[str, Any],
    heads: Heads | None,
    batch: int,
    options: ModelOptions,
    build: Callable[[str], Workload],
    name: str | None = None,
) -> Case:
    """A case of a model, whose outputs with several backends are compared.

    Args:
        fields: What tells the case from others.
        heads: Of its attention; None where kv heads cannot be set.
        batch: Images a call.
        options: Of the run.
        build: From a backend to the workload.
        name: Unique in the report; by default the name of the first field, and all
            fields.
    """
    if name is None:
        parts = filter(None, fields.values())
        name = '/'.join([next(iter(fields)), *parts, f'b{batch}'])
    agreement = Agreement(name, options.amp_dtype)

    def build_checked(backend: str) -> Workload:
        workload = build(backend)
        if workload.output is not None and len(options.backends) > 1:
            workload.check = functools.partial(
                agreement.check, workload.backend, workload.output
            )
        return workload

    fields = {**fields, 'batch': batch, 'params': None}
    return Case(name, fields, batch, build_checked, heads=heads)


def columns(cases: Sequence[dict[str, Any]]) -> list[str]:
    """What tells cases apart: the fields of all of them, in order."""
    names = (name for case in cases for name in case if name not in _HIDDEN)
    return list(dict.fromkeys(names))


def model_table(report: Report) -> str:
    """Every measured row: time, throughput, memory, FLOPs, parameters."""
    cases = {case['name']: case for case in report.cases}
    names = columns(report.cases)
    return records_table(
        [
            _record(report, cases[row.case], row, names)
            for row in report.rows
            if row.timing is not None
        ]
    )


def _record(
    report: Report, case: dict, row: Row, names: Sequence[str]
) -> dict[str, str]:
    seconds = row.timing.median_ms / 1e3
    params, flops = case['params'], row.work['flops']
    return {
        **{name: str(case.get(name, '')) for name in names},
        'M parameters': number(params / 1e6) if params else '',
        **measured_cells(report, row),
        'images/s': number(row.work['images'] / seconds),
        'GFLOP': number(flops / 1e9) if flops else '',
        'GFLOP/s': number(flops / 1e9 / seconds) if flops else '',
    }


def model_figure(report: Report, heading: str):
    """Time and memory of every case by backend; something must have been measured."""
    cases = report.measured_cases()
    names = columns(cases)
    fields = {case['name']: {n: case.get(n, '') for n in names} for case in cases}
    return figures.case_figure(report, fields, heading)


def run_suite(
    suite: str,
    heading: str,
    command: str,
    options: ModelOptions,
    cases: Sequence[Case],
    notes: str,
) -> None:
    """Measure, print the table, and write the files if --out is given.

    Raises:
        GateError: If two backends give different outputs.
    """
    rows = measure([[case] for case in cases], options)
    described = options.describe()
    report = Report.of(suite, command, options.device, described, cases, rows)
    table, missing = model_table(report), missing_lines(report.rows)
    markdown = document(report, heading, _NOTES.format(notes), table, missing)
    draw = functools.partial(model_figure, report, heading)
    pictures = {suite: draw} if report.measured_cases() else {}
    publish(suite, report.to_json(), markdown, options.out, pictures)
