"""The table and the figures of the experiment, from its JSON files."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from .rows import ALPHAS, DISTILLED, KV_HEADS, MERGES, SEEDS, Row, base_row, plan
from .timing import TIMES_FILE

METRIC = 'bbox_mAP'
LABELS = {
    'all': 'multi-head',
    'half': 'Hq/2 kv heads',
    'quarter': 'Hq/4 kv heads',
    'one': '1 kv head',
}
COLORS = {'all': 'black', 'half': 'C0', 'quarter': 'C2', 'one': 'C3'}
BEGIN, END = '<!-- results: written by `report` -->', '<!-- end of results -->'
FIGURES = """\
Figures 3, 4 and 5 of the paper, for this detector. Bars are one standard deviation over
seeds, in figure 3 also the middle 60 % of the times. Rows of a single seed are left
out.

![mAP against time](results/figure_3.png)
![mAP of ways to merge](results/figure_4.png)
![mAP against uptraining](results/figure_5.png)"""
Key = tuple[str, str, float]


class Results:
    """What the rows of each (kv heads, method, alpha) measured, for all seeds."""

    def __init__(self, folder: Path) -> None:
        self.rows = plan()
        self.records = {
            row: json.loads((folder / f'{row.name}.json').read_text())
            for row in self.rows
            if (folder / f'{row.name}.json').exists()
        }
        times = folder / TIMES_FILE
        self.times_ms = (
            json.loads(times.read_text())['times_ms'] if times.exists() else {}
        )

    @property
    def missing(self) -> list[Row]:
        return [row for row in self.rows if row not in self.records]

    def maps(self, key: Key) -> dict[int, float]:
        """mAP by seed, of the seeds that ran."""
        return {
            row.seed: record['metrics'][METRIC]
            for row, record in self.records.items()
            if (row.kv_heads, row.method, row.alpha) == key
        }

    def shares(self, key: Key) -> list[float]:
        """mAP over that of the same seed's multi-head detector."""
        base = self.maps(BASE)
        return [
            value / base[seed] for seed, value in self.maps(key).items() if seed in base
        ]

    def output_errors(self, key: Key) -> list[float]:
        """Mean relative output error of the attention blocks, one for each seed."""
        return [
            statistics.fmean(
                layer['output_error'] for layer in record['layers'].values()
            )
            for row, record in self.records.items()
            if (row.kv_heads, row.method, row.alpha) == key and 'layers' in record
        ]

    def sorted_keys(self) -> list[Key]:
        """Without repetition, sorted for the table."""
        keys = {(row.kv_heads, row.method, row.alpha) for row in self.rows}
        methods = ('multi-head', *MERGES, DISTILLED, 'scratch')
        order = ['all', *KV_HEADS]
        return sorted(
            keys, key=lambda k: (order.index(k[0]), methods.index(k[1]), k[2])
        )


BASE: Key = (base_row(0).kv_heads, base_row(0).method, base_row(0).alpha)


def write_report(folder: Path) -> None:
    """Writes ``figure_3.png`` to ``figure_5.png``, and the table into the README."""
    results = Results(folder)
    draw_time(results, folder / 'figure_3.png')
    draw_methods(results, folder / 'figure_4.png')
    draw_alphas(results, folder / 'figure_5.png')
    readme = folder.parent / 'README.md'
    text = readme.read_text(encoding='utf-8')
    for mark in (BEGIN, END):
        if mark not in text:
            raise ValueError(f'{readme} has no line {mark!r}')
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    parts = [BEGIN, table(results), FIGURES, missing(results), END]
    readme.write_text(head + '\n\n'.join(parts) + tail, encoding='utf-8')


# Table


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean, and the standard deviation if there are at least two values."""
    values = list(values)
    if not values:
        return ''
    mean = f'{statistics.fmean(values):.{digits}f}'
    if len(values) < 2:
        return mean
    return f'{mean} ± {statistics.stdev(values):.{digits}f}'


def table(results: Results) -> str:
    """Markdown; one line for each (kv heads, method, alpha) of the plan."""
    head = ('kv heads', 'method', 'alpha', 'seeds', 'bbox mAP')
    head += ('of multi-head', 'output error')
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    for key in results.sorted_keys():
        maps, shares = results.maps(key), results.shares(key)
        percent = spread([100 * share for share in shares], 1)
        errors = spread(results.output_errors(key))
        cells = [LABELS[key[0]], key[1], f'{key[2]:g}', f'{len(maps)} of {len(SEEDS)}']
        cells += [spread(maps.values()) or 'not run yet']
        cells += [f'{percent} %' if percent else '', errors]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def missing(results: Results) -> str:
    """How many rows have not been run, and how to run them."""
    rows = results.missing
    if not rows:
        return 'All rows of the plan have been run.'
    return (
        f'{len(rows)} of {len(results.rows)} rows have not been run yet: those that '
        'the table lacks. `python -m projects.gqa_uptraining.experiment run` runs them.'
    )


# Figures


def draw_time(results: Results, file: Path) -> None:
    """Figure 3 of the paper: quality against time, before and after uptraining."""
    figure, axes = _figure()
    keys = [BASE, *((name, 'mean', alpha) for alpha in (0, 0.05) for name in KV_HEADS)]
    for key in keys:
        maps = results.maps(key).values()
        if len(maps) < 2 or key[0] not in results.times_ms:
            continue
        times = statistics.quantiles(results.times_ms[key[0]], n=5)
        middle = statistics.median(results.times_ms[key[0]])
        uptrained = key[2] > 0
        axes.errorbar(
            [middle],
            [statistics.fmean(maps)],
            xerr=[[middle - times[0]], [times[-1] - middle]],
            yerr=_deviation(maps),
            fmt='o' if uptrained or key == BASE else 's',
            markerfacecolor=None if uptrained or key == BASE else 'white',
            capsize=3,
            color=COLORS[key[0]],
            label=LABELS[key[0]] + ('' if key == BASE else f', alpha = {key[2]:g}'),
        )
    axes.set_xlabel('CPU time of one thread for an image (ms)')
    _legend(axes)
    _save(figure, file)


def draw_methods(results: Results, file: Path) -> None:
    """Figure 4 of the paper: how the heads are merged, with one kv head."""
    figure, axes = _figure()
    methods = (*MERGES, DISTILLED)
    for shift, alpha in enumerate((0.0, 0.05, 0.1)):
        points = [
            (
                place + 0.2 * (shift - 1),
                list(results.maps(('one', method, alpha)).values()),
            )
            for place, method in enumerate(methods)
        ]
        points = [(place, maps) for place, maps in points if len(maps) > 1]
        if not points:
            continue
        axes.errorbar(
            [statistics.fmean(maps) for _, maps in points],
            [place for place, _ in points],
            xerr=[_deviation(maps) for _, maps in points],
            fmt='o',
            capsize=3,
            color=f'C{shift}',
            label=f'alpha = {alpha:g}',
        )
    _level(results, axes.axvline)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel(axes.get_ylabel())
    axes.set_ylabel('')
    _legend(axes)
    _save(figure, file)


def draw_alphas(results: Results, file: Path) -> None:
    """Figure 5 of the paper: quality against the amount of uptraining."""
    figure, axes = _figure()
    curves = [(name, 'mean', 'o-') for name in KV_HEADS]
    curves.append(('one', DISTILLED, 's--'))
    curves += [(name, 'scratch', 'x') for name in KV_HEADS]
    for name, method, style in curves:
        points = [
            (alpha, results.maps((name, method, alpha)).values())
            for alpha in (0.0, *ALPHAS)
        ]
        points = [(alpha, list(maps)) for alpha, maps in points if len(maps) > 1]
        if not points:
            continue
        axes.errorbar(
            [alpha for alpha, _ in points],
            [statistics.fmean(maps) for _, maps in points],
            yerr=[_deviation(maps) for _, maps in points],
            fmt=style,
            capsize=3,
            color=COLORS[name],
            label=f'{LABELS[name]}, {method}',
        )
    _level(results, axes.axhline)
    axes.set_xlabel('uptraining, as a part of the original iterations (alpha)')
    _legend(axes)
    _save(figure, file)


def _figure():
    # matplotlib takes half a second, and no training needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout='constrained')
    axes = figure.subplots()
    axes.set_ylabel('bbox mAP, 72 test images')
    axes.grid(alpha=0.3)
    return figure, axes


def _legend(axes) -> None:
    if axes.get_legend_handles_labels()[0]:  # else matplotlib warns
        axes.legend(fontsize='small')


def _deviation(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _level(results: Results, draw) -> None:
    """A line where the multi-head detectors are."""
    maps = results.maps(BASE)
    if maps:
        mean = statistics.fmean(maps.values())
        draw(mean, color=COLORS['all'], linestyle=':', label=LABELS['all'])


def _save(figure, file: Path) -> None:
    figure.savefig(file, dpi=120, metadata={'Software': None})
