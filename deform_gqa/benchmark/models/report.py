"""What the suites of models have in common: cases to rows, tables, pictures, files."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from deform_gqa.profiling.environment import describe_environment
from deform_gqa.profiling.markdown import number, records_table

from ..core import figures
from ..core.cases import Case, Workload
from ..core.fields import Fields, split_labels
from ..core.report import Report, Row
from ..core.run import measure
from ..core.tables import document, measured_cells, missing_lines, title
from ..core.writer import publish
from .options import ModelOptions
from .workload import Agreement

# A workload, and a function to the output by which backends are compared.
Built = tuple[Workload, Callable[[], Tensor] | None]
_HIDDEN = ('name', 'params')  # of a case: not columns of their own


def mm_versions() -> dict[str, str]:
    """Of the packages that hold the models, for the report's environment."""
    names = ('mmengine', 'mmcv', 'mmdet')
    return {name: importlib.import_module(name).__version__ for name in names}


def model_case(
    name: str,
    fields: dict[str, Any],
    batch: int,
    options: ModelOptions,
    build: Callable[..., Built],
    *args: Any,
) -> Case:
    """A case of a model.

    Args:
        name: Unique in the report.
        fields: What tells the case from others.
        batch: Images a call.
        options: Of the run; several backends are compared with each other.
        build: Called as build(*args, options, backend) for the workload and a function
            to the output by which backends are compared, or None.
    """
    agreement = Agreement(name, options.amp_dtype)

    def build_checked(backend: str) -> Workload:
        workload, output = build(*args, options, backend)
        if output is not None and len(options.backends) > 1:
            workload.check = lambda: agreement.check(workload.backend, output)
        return workload

    return Case(name, {**fields, 'batch': batch, 'params': None}, batch, build_checked)


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


def labels_of(
    cases: Sequence[dict[str, Any]], names: Sequence[str]
) -> tuple[str, dict[str, str]]:
    """(what all cases share, what tells each from the others by its name)."""
    fields: list[Fields] = [{n: case.get(n, '') for n in names} for case in cases]
    shared, labels = split_labels(fields)
    found = (case['name'] for case in cases)
    return shared, dict(zip(found, labels, strict=True))


def model_figure(report: Report, heading: str):
    """Time and memory of every case by backend; something must have been measured."""
    cases = report.measured_cases()
    shared, labels = labels_of(cases, columns(cases))
    subject = f'{heading}: {shared}' if shared else heading
    return figures.time_and_memory(report, labels, f'{subject}\n{title(report)}')


def run_suite(
    suite: str,
    heading: str,
    command: str,
    options: ModelOptions,
    cases: Sequence[Case],
    notes: str,
) -> None:
    """Measure, print and write.

    Raises:
        GateError: If two backends give different outputs.
    """
    options.use_threads()
    rows = measure([[case] for case in cases], options)
    report = model_report(suite, command, options, cases, rows)
    missing = missing_lines(report.rows)
    markdown = document(report, heading, notes, model_table(report), missing)
    draw = functools.partial(model_figure, report, heading)
    pictures = {suite: draw} if report.measured_cases() else {}
    publish(suite, report.to_json(), markdown, options.out, pictures)


def model_report(
    suite: str,
    command: str,
    options: ModelOptions,
    cases: Sequence[Case],
    rows: list[Row],
) -> Report:
    return Report(
        suite=suite,
        command=command,
        environment={**describe_environment(options.device), **mm_versions()},
        options=options.describe(),
        cases=[case.describe() for case in cases],
        rows=rows,
    )
