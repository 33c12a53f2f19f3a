"""A table of all kinds of attention in one detector, and a search over its options.

    python -m projects.gqa_variants.experiment table
    python -m projects.gqa_variants.experiment report
    python -m projects.gqa_variants.experiment search --budget-ms 60

``table`` trains the rows that have no result yet, one after the other, and writes one
JSON file for each, then the report; a training that was killed goes on from its last
epoch. ``search`` needs the extra ``search``.
"""

import argparse
import re
from pathlib import Path

from mmdet.utils import register_all_modules

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
    training_memory_mib,
)

PROJECT = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('command', choices=['table', 'report', 'search'])
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
    if args.command == 'table':
        for name in ROWS:
            if re.search(args.rows, name):
                run_row(name, args.work_dir, args.results, args.epochs)
    print(write_report(args.results))


def run_row(
    name: str, work_dir: Path, results: Path, epochs: int | None = None
) -> None:
    """Trains, tests and measures a row, unless its result is there."""
    file = results / f'{name}.json'
    if file.exists():
        return
    print(f'{name} ...', flush=True)
    backbone = dict(attention=dict(D=ROWS[name]))
    cfg = make_config(backbone, work_dir / name, epochs)
    measured = dict(
        parameters=count_parameters(cfg),
        latency_ms=latency_ms(cfg),
        training_memory_mib=training_memory_mib(cfg),
    )
    mean_precision, elapsed_s = train_and_test(cfg, 'test')
    results.mkdir(parents=True, exist_ok=True)
    write_json(
        file,
        dict(
            **measured,
            training_s=elapsed_s,
            bbox_mAP=mean_precision,
            epochs=cfg.train_cfg.max_epochs,
            seed=cfg.randomness.seed,
            commit=git_commit(),
            torch=package_version('torch'),
        ),
    )


if __name__ == '__main__':
    main()
