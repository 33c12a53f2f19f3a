"""The table of all kinds and its scatter plot, from the rows' JSON files."""

import json
from pathlib import Path
from typing import Any

from deform_gqa.profiling.markdown import markdown_table, number

from .rows import ROWS

HEADER = (
    'D blocks',
    'backbone parameters',
    'latency [ms]',
    'training step [ms]',
    'training memory [MiB]',
    'bbox mAP',
)


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """What the rows that ran have measured, in the order of the rows."""
    files = {name: folder / f'{name}.json' for name in ROWS}
    return {n: json.loads(f.read_text()) for n, f in files.items() if f.exists()}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown; a row that has not run says so."""
    return markdown_table(HEADER, [_cells(name, results.get(name)) for name in ROWS])


def _cells(name: str, result: dict[str, Any] | None) -> list[str]:
    if result is None or 'latency_ms' not in result:
        return [name, *['not measured yet'] * (len(HEADER) - 1)]
    memory = result['training_memory_mib']
    return [
        name,
        f'{result["parameters"] / 1e6:.2f} M',
        number(result['latency_ms']),
        number(result['step_ms']),
        '' if memory is None else number(memory),
        f'{result["bbox_mAP"]:.3f}',
    ]


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """mAP against latency, one numbered point for each row, from fast to slow."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(9, 6), layout='constrained')
    axes = figure.subplots()
    order = sorted(results, key=lambda name: results[name]['latency_ms'])
    for rank, name in enumerate(order, start=1):
        point = (results[name]['latency_ms'], results[name]['bbox_mAP'])
        axes.scatter(*point, s=30, label=f'{rank}  {name}')
        axes.annotate(rank, point, xytext=(3, 3), textcoords='offset points', size=8)
    figure.legend(loc='outside right upper', fontsize=8)
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel('CPU time of one image [ms]')
    axes.set_ylabel('bbox mAP on BCCD')
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def write_report(folder: Path) -> str:
    """Writes ``table.md`` and ``map_latency.png``; returns the table."""
    results = load_results(folder)
    text = table(results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'table.md').write_text(text + '\n', encoding='utf-8')
    if results:
        draw(results, folder / 'map_latency.png')
    return text
