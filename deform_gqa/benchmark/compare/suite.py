"""``benchmark.py compare BEFORE.json AFTER.json``: what got slower, beyond noise."""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from deform_gqa.profiling.markdown import number, records_table

from ..core import figures
from ..core.errors import OptionError
from ..core.options import check_out
from ..core.report import FORMAT_VERSION, Report
from ..core.tables import join, title
from ..core.writer import publish
from .changes import (
    CONFIDENCE,
    LEAST_SAMPLES,
    Change,
    compare,
    count,
    differences,
    load_report,
)

DESCRIPTION = (
    'Compare two reports of one suite. Exit code 0: no row is slower beyond noise and '
    'tolerance; 1: one is; 2: the reports cannot be compared.'
)
TOLERANCE = 0.05
EXIT_SLOWER = 1
_COLORS = {'slower': '#D55E00', 'same': '#777777', 'faster': '#009E73'}
_MARKERS = {'slower': '>', 'same': 'o', 'faster': '<'}
_FINE_STEPS = (1.0, 1.2, 1.4, 1.7)  # of an octave
_COARSE_SPAN = 4
_INCHES_A_ROW = 0.24
_ROOM_INCHES = 1.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('before', metavar='BEFORE.json', help='a report that --out wrote')
    add('after', metavar='AFTER.json', help='another of the same suite')
    add(
        '--tolerance',
        type=float,
        default=TOLERANCE,
        help=f'ratio of medians less 1 that is let pass (default: {TOLERANCE})',
    )
    add(
        '--force',
        action='store_true',
        help='compare what both have, though devices, settings or rows differ',
    )
    add('--out', metavar='DIR', help='write JSON, Markdown and PNG to this folder')


def run(args: argparse.Namespace, command: str) -> int:
    """Print the ratios, and write the files if --out is given; returns the exit code.

    Raises:
        OptionError: For files that are no reports, or reports that do not fit.
    """
    if not 0 <= args.tolerance < float('inf'):
        raise OptionError(f'--tolerance must be 0 or more, got {args.tolerance}')
    check_out(args.out)
    before, after = load_report(args.before), load_report(args.after)
    reasons = differences(before, after)
    if reasons and not args.force:
        more = f' (and {len(reasons) - 1} more)' if len(reasons) > 1 else ''
        raise OptionError(f'the reports differ: {reasons[0]}{more}; see --force')
    changes = compare(before, after)
    if not changes:
        raise OptionError('the reports have no measured row in common')
    markdown = as_markdown(before, after, changes, reasons, args.tolerance, command)
    record = as_record(args, before, after, changes)
    draw = functools.partial(compare_figure, before, after, changes, args.tolerance)
    publish('compare', record, markdown, args.out, {'compare': draw})
    return EXIT_SLOWER if count(changes, args.tolerance)['slower'] else 0


def as_markdown(
    before: Report,
    after: Report,
    changes: Sequence[Change],
    reasons: Sequence[str],
    tolerance: float,
    command: str,
) -> str:
    """Ratios with their bands; what differs between the reports, if forced."""
    counts = ', '.join(f'{n} {name}' for name, n in count(changes, tolerance).items())
    forced = None
    if reasons:
        forced = 'Compared by force:\n' + '\n'.join(f'- {x}' for x in reasons)
    return join(
        f'# {heading(after)}: {title(after)}',
        f'`{command}`',
        f'{versions(before, after)}. {counts}. The band is where the ratio '
        f'of medians lies with {CONFIDENCE:.0%} confidence for all rows together, by '
        f'bootstrap (the whole range with less than {LEAST_SAMPLES} samples); a row is '
        f'slower or faster if all of it lies more than {tolerance:.0%} from 1.',
        records_table([_record(change, tolerance) for change in changes]),
        forced,
    )


def _record(change: Change, tolerance: float) -> dict[str, str]:
    memory = change.memory_ratio
    return {
        'case': change.case,
        'direction': change.direction,
        'backend': change.backend,
        'before ms': number(change.before_ms),
        'after ms': number(change.after_ms),
        'after / before': f'{change.ratio:.3f}x',
        'noise band': f'{change.low:.3f} - {change.high:.3f}',
        'verdict': change.verdict(tolerance),
        'memory after / before': '' if memory is None else f'{memory:.2f}x',
    }


def heading(report: Report) -> str:
    return f'Change of the suite {report.suite}'


def versions(before: Report, after: Report) -> str:
    """Commits and dates of both."""
    first, second = (
        f'{report.environment.get("commit")} ({report.environment.get("date")})'
        for report in (before, after)
    )
    return f'Before: {first}; after: {second}'


def as_record(
    args: argparse.Namespace, before: Report, after: Report, changes: Sequence[Change]
) -> dict[str, Any]:
    rows = [
        {**dataclasses.asdict(change), 'verdict': change.verdict(args.tolerance)}
        for change in changes
    ]
    return {
        'format_version': FORMAT_VERSION,
        'suite': 'compare',
        'compared_suite': after.suite,
        'before': {'path': args.before, 'environment': before.environment},
        'after': {'path': args.after, 'environment': after.environment},
        'tolerance': args.tolerance,
        'rows': rows,
    }


def compare_figure(
    before: Report, after: Report, changes: Sequence[Change], tolerance: float
):
    """A ratio with its band for every row; the tolerance shaded."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = figures.new_figure((11, len(changes) * _INCHES_A_ROW + _ROOM_INCHES))
    axes = figure.subplots()
    label = f'within the tolerance of {tolerance:.0%}'
    axes.axvspan(
        1 / (1 + tolerance),
        1 + tolerance,
        color='#56B4E9',
        alpha=0.25,
        lw=0,
        label=label,
    )
    for y, change in enumerate(changes):
        verdict = change.verdict(tolerance)
        spread = [[change.ratio - change.low], [change.high - change.ratio]]
        axes.errorbar(
            change.ratio,
            y,
            xerr=spread,
            color=_COLORS[verdict],
            marker=_MARKERS[verdict],
            label=verdict,
            ls='',
            ms=5,
        )
        text = f'{change.ratio:.2f}x'
        figures.write_text(axes, text, change.high, y)
    axes.axvline(1, color='black', lw=0.8)
    axes.set_xscale('log', base=2)
    low, high = axes.get_xlim()
    low, high = min(low, 0.8), max(high, 1.25)
    axes.set_xlim(low, high * (high / low) ** 0.06)  # room for the values
    steps = _FINE_STEPS if high / low < _COARSE_SPAN else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:.3g}'))
    axes.xaxis.set_minor_locator(NullLocator())
    labels = [f'{c.case} {c.backend} {c.direction}' for c in changes]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel('median time after / before (bars: noise band); right is slower')
    axes.grid(axis='x', alpha=0.3)
    figures.legend(figure)
    commits = [report.environment.get('commit') for report in (before, after)]
    figure.suptitle(f'{heading(after)}: {commits[0]} to {commits[1]}\n{title(after)}')
    return figure
