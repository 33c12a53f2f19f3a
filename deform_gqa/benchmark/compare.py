"""``benchmark.py compare BEFORE.json AFTER.json``: what got slower, beyond noise."""

import argparse
import collections
import functools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deform_gqa.profiling.markdown import number, records_table
from deform_gqa.profiling.timing import Timing

from .core import figures
from .core.errors import OptionError
from .core.options import OUT, number_from
from .core.report import FORMAT_VERSION, Report, Row
from .core.tables import join, title
from .core.writer import publish

DESCRIPTION = (
    'Compare two reports of one suite. Exit code 0: no row is slower beyond noise and '
    'tolerance; 1: one is; 2: the reports cannot be compared.'
)
TOLERANCE = 0.05
EXIT_SLOWER = 1
CONFIDENCE = 0.95
RESAMPLES = 1000
# Fewer samples say too little about their spread: their whole range is the band.
LEAST_SAMPLES = 8
# Colour and marker by verdict.
_LOOKS = {
    'slower': ('#D55E00', '>'),
    'same': ('#777777', 'o'),
    'faster': ('#009E73', '<'),
}
_FINE_STEPS = (1.0, 1.2, 1.4, 1.7)  # of an octave
_COARSE_SPAN = 4
_INCHES_A_ROW = 0.24
_ROOM_INCHES = 1.6
# A row before and after: median and peak memory after over before ('memory_ratio' is
# None where one is unknown), ends of the noise band, and the verdict.
Change = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('before', metavar='BEFORE.json', help='a report that --out wrote')
    add('after', metavar='AFTER.json', help='another of the same suite')
    add(
        '--tolerance',
        type=number_from(0.0),
        default=TOLERANCE,
        help=f'ratio of medians less 1 that is let pass (default: {TOLERANCE})',
    )
    add(
        '--force',
        action='store_true',
        help='compare what both have, though devices, settings or rows differ',
    )
    add('--out', **OUT)


def run(args: argparse.Namespace, command: str) -> int:
    """Print the ratios, and write the files if --out is given; returns the exit code.

    Raises:
        OptionError: For files that are no reports, or reports that do not fit.
    """
    before, after = load_report(args.before), load_report(args.after)
    reasons = differences(before, after)
    if reasons and not args.force:
        more = f' (and {len(reasons) - 1} more)' if len(reasons) > 1 else ''
        raise OptionError(f'the reports differ: {reasons[0]}{more}; see --force')
    changes = compare(before, after, args.tolerance)
    if not changes:
        raise OptionError('the reports have no measured row in common')
    record = {
        'format_version': FORMAT_VERSION,
        'suite': 'compare',
        'compared_suite': after.suite,
        'before': {'path': args.before, 'environment': before.environment},
        'after': {'path': args.after, 'environment': after.environment},
        'tolerance': args.tolerance,
        'rows': changes,
    }
    reports = before, after, changes, args.tolerance
    draw = functools.partial(compare_figure, *reports)
    text = compare_markdown(*reports, reasons, command)
    publish('compare', record, text, args.out, {'compare': draw})
    return EXIT_SLOWER if any(x['verdict'] == 'slower' for x in changes) else 0


# Reports


def load_report(path: str) -> Report:
    """Read a report.

    Raises:
        OptionError: If the file is missing or no report.
    """
    try:
        return Report.load(Path(path))
    except OSError as error:
        raise OptionError(f'{path}: {error.strerror}') from error
    except json.JSONDecodeError as error:
        raise OptionError(f'{path} is no JSON file: {error}') from error
    except (KeyError, TypeError, AttributeError) as error:
        raise OptionError(f'{path} is no report of this tool: {error}') from error
    except ValueError as error:
        raise OptionError(str(error)) from error


def differences(before: Report, after: Report) -> list[str]:
    """Why the reports cannot be compared, one line each."""
    facts = [_facts(report) for report in (before, after)]
    lines = [
        f'{name}: {first} before, {second} after'
        for (name, first), second in zip(
            facts[0].items(), facts[1].values(), strict=True
        )
        if first != second
    ]
    cases = {case['name']: case for case in before.cases}
    lines += [
        f'case {case["name"]} is another than before'
        for case in after.cases
        if cases.get(case['name'], case) != case
    ]
    missing = [key for key in _measured(before) if key not in _measured(after)]
    return lines + [f'{" ".join(key)} is missing after' for key in missing]


def _facts(report: Report) -> dict[str, Any]:
    """What must be the same in both."""
    env = report.environment
    return {
        'suite': report.suite,
        'device': env.get('device'),
        # CPU threads do not matter to what runs on a GPU.
        'threads': env.get('threads') if env.get('device_type') == 'cpu' else None,
        'dtype': report.options.get('dtype'),
    }


def _measured(report: Report) -> dict[tuple[str, str, str], Row]:
    rows = [row for row in report.rows if row.timing is not None]
    return {(row.case, row.backend, row.direction): row for row in rows}


# Changes


def compare(before: Report, after: Report, tolerance: float) -> list[Change]:
    """All rows that both reports measured, in the order of the second."""
    rows = _measured(before)
    pairs = [(rows[key], row) for key, row in _measured(after).items() if key in rows]
    return [change(*pair, len(pairs), tolerance) for pair in pairs]


def change(before: Row, after: Row, rows: int, tolerance: float) -> Change:
    """Two measured rows, out of ``rows`` that are compared.

    Slower or faster only if all of the noise band lies beyond the tolerance.
    """
    low, high = noise_band(before.timing, after.timing, rows)
    faster = 'faster' if high < 1 / (1 + tolerance) else 'same'
    memory = None
    if before.peak_memory_mib and after.peak_memory_mib is not None:
        memory = after.peak_memory_mib / before.peak_memory_mib
    return dict(
        case=after.case,
        backend=after.backend,
        direction=after.direction,
        before_ms=before.timing.median_ms,
        after_ms=after.timing.median_ms,
        ratio=after.timing.median_ms / before.timing.median_ms,
        low=low,
        high=high,
        memory_ratio=memory,
        verdict='slower' if low > 1 + tolerance else faster,
    )


def noise_band(before: Timing, after: Timing, rows: int = 1) -> tuple[float, float]:
    """Confidence interval of the ratio of medians, after over before.

    Its width is the standard error of the logarithm among resampled medians. It holds
    for all ``rows`` of a comparison together: of a hundred, some would look slower by
    chance. With few samples, all ratios of a sample after to a sample before.
    """
    first, second = (np.asarray(timing.samples_ms) for timing in (before, after))
    if min(len(first), len(second)) < LEAST_SAMPLES:
        low, high = second.min() / first.max(), second.max() / first.min()
        return float(low), float(high)
    generator = np.random.default_rng(0)
    logs = np.log(_medians(second, generator) / _medians(first, generator))
    tail = (1 - CONFIDENCE) / 2 / rows
    width = statistics.NormalDist().inv_cdf(1 - tail) * float(logs.std(ddof=1))
    ratio = after.median_ms / before.median_ms
    return ratio * math.exp(-width), ratio * math.exp(width)


def _medians(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Medians of samples drawn from the samples, with replacement."""
    drawn = generator.choice(samples, (RESAMPLES, len(samples)))
    return np.median(drawn, axis=1)


# Table and picture


def compare_markdown(
    before: Report,
    after: Report,
    changes: Sequence[Change],
    tolerance: float,
    reasons: Sequence[str],
    command: str,
) -> str:
    """Ratios with their bands; what differs between the reports, if forced."""
    verdicts = collections.Counter(change['verdict'] for change in changes)
    counts = ', '.join(f'{verdicts[name]} {name}' for name in _LOOKS)
    first, second = (
        f'{report.environment.get("commit")} ({report.environment.get("date")})'
        for report in (before, after)
    )
    forced = None
    if reasons:
        forced = 'Compared by force:\n' + '\n'.join(f'- {x}' for x in reasons)
    return join(
        f'# {_heading(after)}: {title(after)}',
        f'`{command}`',
        f'Before: {first}; after: {second}. {counts}. The band is where the ratio '
        f'of medians lies with {CONFIDENCE:.0%} confidence for all rows together, by '
        f'bootstrap (the whole range with less than {LEAST_SAMPLES} samples); a row is '
        f'slower or faster if all of it lies more than {tolerance:.0%} from 1.',
        records_table([_cells(change) for change in changes]),
        forced,
    )


def _cells(change: Change) -> dict[str, str]:
    memory = change['memory_ratio']
    return {
        'case': change['case'],
        'direction': change['direction'],
        'backend': change['backend'],
        'before ms': number(change['before_ms']),
        'after ms': number(change['after_ms']),
        'after / before': f'{change["ratio"]:.3f}x',
        'noise band': f'{change["low"]:.3f} - {change["high"]:.3f}',
        'verdict': change['verdict'],
        'memory after / before': '' if memory is None else f'{memory:.2f}x',
    }


def _heading(report: Report) -> str:
    return f'Change of the suite {report.suite}'


def compare_figure(
    before: Report, after: Report, changes: Sequence[Change], tolerance: float
):
    """A ratio with its band for every row; the tolerance shaded."""
    figure = figures.new_figure((11, len(changes) * _INCHES_A_ROW + _ROOM_INCHES))
    axes = figure.subplots()
    shaded = dict(color='#56B4E9', alpha=0.25, lw=0)
    label = f'within the tolerance of {tolerance:.0%}'
    axes.axvspan(1 / (1 + tolerance), 1 + tolerance, label=label, **shaded)
    for y, change in enumerate(changes):
        color, marker = _LOOKS[change['verdict']]
        look = dict(color=color, marker=marker, ls='', ms=5, label=change['verdict'])
        ratio, low, high = change['ratio'], change['low'], change['high']
        axes.errorbar(ratio, y, xerr=[[ratio - low], [high - ratio]], **look)
        figures.write_text(axes, f'{ratio:.2f}x', high, y)
    axes.axvline(1, color='black', lw=0.8)
    axes.set_xscale('log', base=2)
    low, high = axes.get_xlim()
    low, high = min(low, 0.8), max(high, 1.25)
    steps = _FINE_STEPS if high / low < _COARSE_SPAN else (1.0,)
    figures.tick(axes, steps, base=2)
    axes.set_xlim(low, high * (high / low) ** 0.06)  # room for the values
    labels = [f'{x["case"]} {x["backend"]} {x["direction"]}' for x in changes]
    figures.label_rows(axes, labels)
    axes.set_xlabel('median time after / before (bars: noise band); right is slower')
    axes.grid(axis='x', alpha=0.3)
    figures.legend(figure)
    commits = [report.environment.get('commit') for report in (before, after)]
    figure.suptitle(f'{_heading(after)}: {commits[0]} to {commits[1]}\n{title(after)}')
    return figure
