"""The report of the suites that measure models: tables, pictures, files."""

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deform_gqa.profiling.environment import describe_environment

from . import panels
from .model_measure import ModelCase, measure
from .model_options import ModelOptions
from .report import Report, Row
from .tables import (
    ROW_HEADER,
    environment_lines,
    markdown_table,
    measured_cells,
    missing_lines,
    number,
    title,
    without_empty_columns,
)

_HIDDEN = ('name', 'params')  # of a case: not columns of their own
_IMAGE_COLUMN = 'image'


def mm_versions() -> dict[str, str]:
    """Of the packages that hold the models, for the report's environment."""
    names = ('mmengine', 'mmcv', 'mmdet')
    return {name: importlib.import_module(name).__version__ for name in names}


def columns(cases: Sequence[dict[str, Any]]) -> list[str]:
    """What tells cases apart: the fields of all of them, in order."""
    return list(
        dict.fromkeys(name for case in cases for name in case if name not in _HIDDEN)
    )


def model_table(report: Report) -> str:
    """Every measured row: time, throughput, memory, FLOPs, parameters."""
    cases = {case['name']: case for case in report.cases}
    names = columns(report.cases)
    lines = [
        _line(report, cases[row.case], row, names)
        for row in report.rows
        if row.timing is not None
    ]
    header = [*names, 'M parameters', 'direction', *ROW_HEADER]
    header += ['images/s', 'GFLOP', 'GFLOP/s']
    return markdown_table(*without_empty_columns(header, lines))


def _line(report: Report, case: dict, row: Row, names: Sequence[str]) -> list[str]:
    params = case['params']
    cells = [str(case.get(name, '')) for name in names]
    cells.append('' if not params else number(params / 1e6))
    cells += [row.direction, row.backend, *measured_cells(report, row)]
    seconds = row.timing.median_ms / 1e3
    cells.append(number(row.work['images'] / seconds))
    flops = row.work['flops']
    if flops:
        cells += [number(flops / 1e9), number(flops / 1e9 / seconds)]
    else:
        cells += ['', '']
    return cells


def model_markdown(report: Report, heading: str, notes: Sequence[str]) -> str:
    """The whole report; ``notes`` say what exactly was measured."""
    parts = [
        f'# {heading}: {title(report)}',
        f'`{report.command}`',
        *environment_lines(report),
        ' '.join(notes),
        model_table(report),
    ]
    missing = missing_lines(report.rows)
    if missing is not None:
        parts.append(missing)
    return '\n\n'.join(parts) + '\n'


def split_labels(cases: Sequence[dict], names: Sequence[str]) -> tuple[str, list[str]]:
    """(what all cases share, what tells each from the others)."""
    texts = [{n: field_text(n, case.get(n, '')) for n in names} for case in cases]
    shared = [n for n in names if len({text[n] for text in texts}) == 1]
    if len(cases) == 1:
        shared = list(names[1:])
    labels = [
        ', '.join(text[n] for n in names if n not in shared and text[n])
        for text in texts
    ]
    return ', '.join(texts[0][n] for n in shared if texts[0][n]), labels


def field_text(name: str, value: Any) -> str:
    """A field of a case as it stands in a title or at an axis."""
    if value == '':
        return ''
    if name in ('batch', 'stage'):
        return f'{name} {value}'
    if name == 'kv heads':
        return f'{value} kv heads'
    return f'{value} px' if name == _IMAGE_COLUMN else str(value)


def model_figure(report: Report, heading: str):
    """Time and memory of every case by backend; something must have been measured."""
    measured = {row.case for row in report.rows if row.timing is not None}
    cases = [case for case in report.cases if case['name'] in measured]
    directions = [
        direction
        for direction in report.options['directions']
        if any(r.direction == direction and r.timing is not None for r in report.rows)
    ]
    backends = {row.backend for row in report.rows if row.timing is not None}
    points = len(cases) * (len(backends) + 1)
    figure = panels.new_figure(panels.figure_inches(points, len(directions)))
    shared, labels = split_labels(cases, columns(cases))
    names = [case['name'] for case in cases]
    panels.time_and_memory_panels(figure, report.rows, names, labels, directions)
    subject = f'{heading}: {shared}' if shared else heading
    figure.suptitle(f'{subject}\n{title(report)}')
    return figure


def run_suite(
    suite: str,
    heading: str,
    command: str,
    options: ModelOptions,
    cases: Sequence[ModelCase],
    notes: Sequence[str],
) -> None:
    """Measure, print and write; what the suites of models have in common.

    Raises:
        GateError: If two backends give different outputs.
    """
    options.use_threads()
    report = Report(
        suite=suite,
        command=command,
        environment={**describe_environment(options.device), **mm_versions()},
        options=options.describe(),
        **measure(cases, options).as_report(),
    )
    markdown = model_markdown(report, heading, notes)
    figures = [(suite, functools.partial(model_figure, report, heading))]
    publish(report, markdown, options.out, figures)


def publish(
    report: Report, markdown: str, out: str | None, figures: Sequence[tuple[str, Any]]
) -> None:
    """Print the tables; write them, the samples and the pictures if ``out`` is given.

    Args:
        figures: (name, function that draws it) of each picture.
    """
    print(markdown)
    if out is None:
        return
    out_dir = Path(out)
    report.save(out_dir / f'{report.suite}.json')
    (out_dir / f'{report.suite}.md').write_text(markdown)
    names = [f'{report.suite}.json', f'{report.suite}.md']
    reason = panels.unavailable_reason()
    if any(row.timing is not None for row in report.rows) and reason is None:
        for name, draw in figures:
            draw().savefig(out_dir / f'{name}.png', dpi=panels.DPI)
            names.append(f'{name}.png')
    print(f'written to {out_dir}: {", ".join(names)}')
    if reason is not None:
        print(reason)
