"""A report as Markdown."""

from collections.abc import Iterable, Sequence

from deform_gqa.profiling.markdown import markdown_table, number

from .op_cases import STAGES_OF
from .op_peers import BASELINE
from .report import Report, Row
from .sdpa_cases import OP as SDPA

_PLACE_HEADER = ('stage', 'image')
_SDPA_PLACE_HEADER = ('map', 'views', 'points')
_CASE_HEADER = ('batch', 'kv heads', 'queries x keys', 'direction')
ROW_HEADER = (
    'backend',
    'median ms',
    'p20 - p80 ms',
    f'faster than {BASELINE}',
    'peak memory MiB',
    f'{BASELINE} memory / this',
)
_FLOOR_HEADER = ('time / floor',)
_WORK_HEADER = ('M pairs', 'M exps', 'GFLOP', 'MB moved')
_SAMPLE_HEADER = ('M samples', 'MB gathered')
_LIMIT_HEADER = ('exp us', 'tensor us', 'memory us')
_WORK_TITLE = 'Work that no implementation can leave out'
_SAMPLE_TITLE = (
    ', and what it gathers (and scatters) if it samples vectors, which is no limit: it '
    'comes from caches, and products of whole maps can replace it'
)
_ENVIRONMENT = (
    *('torch', 'triton', 'cuda', 'python', 'mmengine', 'mmcv', 'mmdet'),
    *('deform_gqa', 'commit', 'date'),
)


def without_empty_columns(
    header: Sequence[str], lines: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Header and lines, less the columns in which no line has a text."""
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    return [header[i] for i in kept], [[line[i] for i in kept] for line in lines]


def _ratio(top: float | None, bottom: float | None) -> str:
    if top is None or not bottom:
        return ''
    return f'{number(top / bottom)}x'


def measured_cells(report: Report, row: Row) -> list[str]:
    """Time and memory of a row that has a timing, beside those of the baseline."""
    timing = row.timing
    if timing is None:
        raise ValueError(f'{row.case} {row.backend} was not measured')
    base = report.row(row.case, BASELINE, row.direction)
    faster = smaller = ''
    if base is not None and base.timing is not None:
        faster = _ratio(base.timing.median_ms, timing.median_ms)
        smaller = _ratio(base.peak_memory_mib, row.peak_memory_mib)
    memory = row.peak_memory_mib
    return [
        number(timing.median_ms),
        f'{number(timing.p20_ms)} - {number(timing.p80_ms)}',
        faster,
        'unknown' if memory is None else number(memory),
        smaller,
    ]


def _case_header(op: str) -> tuple[str, ...]:
    return (_SDPA_PLACE_HEADER if op == SDPA else _PLACE_HEADER) + _CASE_HEADER


def _place_cells(case: dict) -> list[str]:
    if case['op'] == SDPA:
        height, width = case['grid_size']
        return [f'{height}x{width}', str(case['views']), str(case['points'])]
    height, width = case['image_size']
    return [str(case['stage']), f'{height}x{width}']


def _case_cells(case: dict) -> list[str]:
    return [
        *_place_cells(case),
        str(case['batch']),
        f'{case["num_kv_heads"]} of {case["num_heads"]}',
        f'{case["num_queries"]} x {case["keys_per_query"]}',
    ]


def _rows_of(report: Report, op: str) -> list[tuple[dict, Row]]:
    cases = {case['name']: case for case in report.cases if case['op'] == op}
    return [(cases[row.case], row) for row in report.rows if row.case in cases]


def op_table(report: Report, op: str) -> str:
    """Every measured row of one op."""
    floors = any(row.floor_us for row in report.rows)
    lines = []
    for case, row in _rows_of(report, op):
        if row.timing is None:
            continue
        cells = [*_case_cells(case), row.direction, row.backend]
        cells += measured_cells(report, row)
        if floors:
            cells.append(_ratio(row.timing.median_ms * 1e3, row.least_us))
        lines.append(cells)
    header = _case_header(op) + ROW_HEADER + (_FLOOR_HEADER if floors else ())
    return markdown_table(header, lines)


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


def work_table(report: Report, op: str) -> str:
    """The least work of each case, and the least times on a device that is known."""
    floors = any(row.floor_us for row in report.rows)
    lines: dict[tuple[str, str], list[str]] = {}
    for case, row in _rows_of(report, op):
        work = row.work
        cells = [*_case_cells(case), row.direction]
        cells += [number(work[name] / 1e6) for name in ('pairs', 'exps')]
        cells += [number(work['flops'] / 1e9), number(work['bytes'] / 1e6)]
        if op == SDPA:
            cells += [number(work[x] / 1e6) for x in ('samples', 'gathered_bytes')]
        cells += [number(us) for us in (row.floor_us or {}).values()]
        lines[row.case, row.direction] = cells
    header = _case_header(op) + _WORK_HEADER
    header += _SAMPLE_HEADER if op == SDPA else ()
    header += _LIMIT_HEADER if floors else ()
    return markdown_table(header, lines.values())


def totals(report: Report, op: str) -> list[dict]:
    """All layers of a backbone together, where every stage was measured.

    Sums layers times medians over the stages; one entry per image size, batch, share
    of kv heads, direction and backend. Nothing for an op of no stage.
    """
    if op not in STAGES_OF:
        return []
    groups: dict[tuple, list[tuple[dict, Row]]] = {}
    for case, row in _rows_of(report, op):
        for share in _kv_shares(case):
            values = (tuple(case['image_size']), case['batch'], share)
            key = (*values, row.direction, row.backend)
            groups.setdefault(key, []).append((case, row))
    names = ('image_size', 'batch', 'kv_heads', 'direction', 'backend')
    return [
        dict(zip(names, key, strict=True), **_sum(members))
        for key, members in groups.items()
        if {case['stage'] for case, _ in members} == STAGES_OF[op]
        and all(row.timing is not None for _, row in members)
    ]


def _kv_shares(case: dict) -> list[str]:
    """'half' and 'one' may be the same number of heads."""
    heads, kv_heads = case['num_heads'], case['num_kv_heads']
    shares = {'full': heads, 'half': heads // 2, 'one': 1}
    return [name for name, count in shares.items() if count == kv_heads]


def _sum(members: list[tuple[dict, Row]]) -> dict:
    total = dict(layers=0, ms=0.0, floor_ms=0.0)
    for case, row in members:
        total['layers'] += case['layers']
        total['ms'] += case['layers'] * (row.timing.median_ms if row.timing else 0.0)
        total['floor_ms'] += case['layers'] * (row.least_us or 0.0) / 1e3
    return total


def totals_table(report: Report, op: str) -> str | None:
    """The totals as Markdown; None where no backend has every stage."""
    entries = totals(report, op)
    base = {_total_key(x): x['ms'] for x in entries if x['backend'] == BASELINE}
    lines = []
    for x in entries:
        height, width = x['image_size']
        floor = x['floor_ms'] or None
        lines.append(
            [
                f'{height}x{width}',
                str(x['batch']),
                x['kv_heads'],
                str(x['layers']),
                x['direction'],
                x['backend'],
                number(x['ms']),
                _ratio(base.get(_total_key(x)), x['ms']),
                '' if floor is None else number(floor),
                '' if floor is None else _ratio(x['ms'], floor),
            ]
        )
    header = ('image', 'batch', 'kv heads', 'layers', 'direction', 'backend', 'ms')
    header += (f'faster than {BASELINE}', 'floor ms', 'time / floor')
    return markdown_table(header, lines) if lines else None


def _total_key(entry: dict) -> tuple:
    names = ('image_size', 'batch', 'kv_heads', 'direction')
    return tuple(entry[name] for name in names)


def title(report: Report) -> str:
    """Device, dtype and threads in one line."""
    env = report.environment
    parts = [env['device'], report.options['dtype']]
    if env['device_type'] == 'cpu':
        parts.append(f'{env["threads"]} threads' if env['threads'] != 1 else '1 thread')
    return ', '.join(parts)


def environment_lines(report: Report) -> list[str]:
    """Versions, commit, date and load."""
    env = report.environment
    found = {name: env[name] for name in _ENVIRONMENT if env.get(name)}
    versions = ', '.join(f'{name} {value}' for name, value in found.items())
    return [
        f'{versions}. Load average before measuring: {env["load_average"]} on '
        f'{env["cpu_count"]} cores.'
    ]


def op_markdown(report: Report) -> str:
    """The whole report of the op suite."""
    parts = [
        f'# Ops: {title(report)}',
        f'`{report.command}`',
        *environment_lines(report),
        'Medians over the samples; memory is the peak during a call over the use '
        'before it. Each backend passed the comparison with `naive` first.',
    ]
    for op in dict.fromkeys(case['op'] for case in report.cases):
        parts += [f'## {op}', op_table(report, op)]
        missing = missing_lines(row for _, row in _rows_of(report, op))
        if missing is not None:
            parts.append(missing)
        parts += [_WORK_TITLE + (_SAMPLE_TITLE if op == SDPA else '') + ':']
        parts.append(work_table(report, op))
        total = totals_table(report, op)
        if total is not None:
            parts += [f'All {op} layers of DAT-T++ (layers times medians):', total]
    return '\n\n'.join(parts) + '\n'
