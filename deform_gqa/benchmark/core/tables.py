"""Reports as Markdown: what the tables of all suites have in common."""

from collections.abc import Iterable, Mapping

from deform_gqa.profiling.markdown import number
from deform_gqa.profiling.timing import Timing

from .report import Report, Row

REFERENCE = 'naive'  # the backend that the others are compared with
_ENVIRONMENT = (
    *('torch', 'triton', 'cuda', 'python', 'mmengine', 'mmcv', 'mmdet'),
    *('deform_gqa', 'commit', 'date'),
)


def ratio(top: float | None, bottom: float | None) -> str:
    """How many times ``bottom`` goes into ``top``; empty where one is missing."""
    return f'{number(top / bottom)}x' if top is not None and bottom else ''


def spread(timing: Timing) -> str:
    return f'{number(timing.p20_ms)} - {number(timing.p80_ms)}'


def memory_text(mib: float | None) -> str:
    return 'unknown' if mib is None else number(mib)


def measured_cells(report: Report, row: Row) -> dict[str, str]:
    """Backend, time and memory of a measured row, beside those of the reference."""
    base = report.row(row.case, REFERENCE, row.direction)
    base_ms = base.timing.median_ms if base else None
    base_mib = base.peak_memory_mib if base else None
    return {
        'direction': row.direction,
        'backend': row.backend,
        'median ms': number(row.timing.median_ms),
        'p20 - p80 ms': spread(row.timing),
        f'faster than {REFERENCE}': ratio(base_ms, row.timing.median_ms),
        'peak memory MiB': memory_text(row.peak_memory_mib),
        f'{REFERENCE} memory / this': ratio(base_mib, row.peak_memory_mib),
    }


def missing_lines(rows: Iterable[Row]) -> str | None:
    """What was not measured and why, one line for each reason."""
    cases: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        if row.reason is not None:
            key = (row.backend, row.status, row.reason)
            cases.setdefault(key, set()).add(row.case)
    lines = [
        f'- {backend} {status}: {reason} ({len(names)} cases)'
        for (backend, status, reason), names in cases.items()
    ]
    return '\n'.join(lines) if lines else None


def title(report: Report) -> str:
    """Device, dtype and threads in one line."""
    env = report.environment
    parts = [env['device'], report.options['dtype']]
    if env['device_type'] == 'cpu':
        parts.append(threads_text(env))
    return ', '.join(parts)


def threads_text(environment: Mapping) -> str:
    count = environment['threads']
    return '1 thread' if count == 1 else f'{count} threads'


def environment_line(environment: Mapping) -> str:
    """Versions, commit, date and load."""
    found = {name: environment[name] for name in _ENVIRONMENT if environment.get(name)}
    versions = ', '.join(f'{name} {value}' for name, value in found.items())
    return (
        f'{versions}. Load average before measuring: {environment["load_average"]} on '
        f'{environment["cpu_count"]} cores.'
    )


def join(*parts: str | None) -> str:
    """Paragraphs of a document; None for one that is left out."""
    return '\n\n'.join(part for part in parts if part is not None) + '\n'


def document(report: Report, heading: str, *parts: str | None) -> str:
    """A report's text: title, command and environment before the parts."""
    head = (f'# {heading}: {title(report)}', f'`{report.command}`')
    return join(*head, environment_line(report.environment), *parts)
