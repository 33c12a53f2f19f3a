"""A table of all kinds of attention in one detector, and a search over its options.

    python -m projects.gqa_variants.experiment table
    python -m projects.gqa_variants.experiment measure
    python -m projects.gqa_variants.experiment report
    python -m projects.gqa_variants.experiment search --budget-ms 60

``table`` trains the rows that have no result yet, one after the other, and writes one
JSON file for each, then the report; a training that was killed goes on from its last
epoch. ``measure`` takes the times and the memory of all trained rows anew, so that they
come from the same minutes. ``search`` needs the extra ``search``.
"""

import argparse
import json
import re
from pathlib import Path

from mmdet.utils import register_all_modules
from mmengine.config import Config

from deform_gqa.datasets.coco import write_json
from deform_gqa.profiling.environment import git_commit, package_version
from projects.gqa_variants.gqa_variants.report import write_report
from projects.gqa_variants.gqa_variants.rows import ROWS
from projects.gqa_variants.gqa_variants.search import search
from projects.gqa_variants.gqa_variants.training import (
    count_parameters,
    latency_ms,
    make_config,
    train_and_test,
    training_cost,
)

PROJECT = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('command', choices=['table', 'measure', 'report', 'search'])
    add('--rows', default='', help='regular expression of row names')
    add('--work-dir', type=Path, default=Path('work_dirs/gqa_variants'))
    add('--results', type=Path, default=PROJECT / 'results')
    add('--epochs', type=int, help='of each training (table: 6, search: 3)')
    add('--budget-ms', type=float, default=60.0, help='search: largest latency')
    add('--trials', type=int, default=30, help='search: number of trials in all')
    args = parser.parse_args(argv)
    register_all_modules()
    if args.command == 'search':
        folder = args.work_dir / 'search'
        best = search(folder, args.budget_ms, args.trials, args.epochs or 3)
        print(f'best: {best}; history: {folder / "history.png"}')
        return
    rows = [name for name in ROWS if re.search(args.rows, name)]
    if args.command == 'table':
        for name in rows:
            run_row(name, args.work_dir, args.results, args.epochs)
    elif args.command == 'measure':
        for name in rows:
            measure_row(name, args.results)
    print(write_report(args.results))


def run_row(
    name: str, work_dir: Path, results: Path, epochs: int | None = None
) -> None:
    """Trains, tests and measures a row, unless its result is there."""
    file = results / f'{name}.json'
    if file.exists():
        return
    print(f'{name} ...', flush=True)
    cfg = row_config(name, work_dir / name, epochs)
    trained = dict(
        bbox_mAP=train_and_test(cfg, 'test'),
        epochs=cfg.train_cfg.max_epochs,
        seed=cfg.randomness.seed,
        commit=git_commit(),
        torch=package_version('torch'),
    )
    results.mkdir(parents=True, exist_ok=True)
    write_json(file, trained)
    measure_row(name, results)


def measure_row(name: str, results: Path) -> None:
    """Writes parameters, times and memory into the result of a row that is trained."""
    file = results / f'{name}.json'
    if not file.exists():
        return
    cfg = row_config(name, Path('unused'))
    step_ms, memory_mib = training_cost(cfg)
    measured = dict(
        parameters=count_parameters(cfg),
        latency_ms=latency_ms(cfg),
        step_ms=step_ms,
        training_memory_mib=memory_mib,
    )
    write_json(file, {**json.loads(file.read_text()), **measured})


def row_config(name: str, work_dir: Path, epochs: int | None = None) -> Config:
    return make_config(dict(attention=dict(D=ROWS[name])), work_dir, epochs)


if __name__ == '__main__':
    main()
