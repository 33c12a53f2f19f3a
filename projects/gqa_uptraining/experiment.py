"""The uptraining experiment: runs its rows, reports on them.

    python -m projects.gqa_uptraining.experiment run
    python -m projects.gqa_uptraining.experiment select
    python -m projects.gqa_uptraining.experiment time
    python -m projects.gqa_uptraining.experiment report

``run`` goes through the rows in their order and writes one JSON file for each; rows
that have one are skipped, and a training that was killed goes on from its last
checkpoint. Several processes may run at once: each takes rows that no other has.
``select`` trains the rows that chose the learning rate and the weight of distillation,
and evaluates them on the validation images. ``time`` measures the backbones, ``report``
writes the table and the figures.
"""

import argparse
import fcntl
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmdet.utils import register_all_modules

from projects.gqa_uptraining.gqa_uptraining.execution import Experiment
from projects.gqa_uptraining.gqa_uptraining.report import write_report
from projects.gqa_uptraining.gqa_uptraining.rows import Row, plan, selection_rows
from projects.gqa_uptraining.gqa_uptraining.timing import measure_times

PROJECT = Path(__file__).parent
WAIT_S = 30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('command', choices=['run', 'select', 'time', 'report'])
    parser.add_argument('--rows', default='', help='regular expression of row names')
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/gqa_uptraining')
    )
    parser.add_argument('--results', type=Path, default=PROJECT / 'results')
    parser.add_argument(
        '--no-wait',
        action='store_true',
        help='end when the rows that are left wait for other processes',
    )
    args = parser.parse_args()
    experiment = Experiment(args.work_dir, args.results)
    if args.command == 'report':
        write_report(args.results)
        return
    register_all_modules()
    if args.command == 'time':
        measure_times(experiment)
        return
    rows, split = (
        (plan(), 'test') if args.command == 'run' else (selection_rows(), 'val')
    )
    rows = [
        row
        for row in rows
        if re.search(args.rows, row.training if split == 'val' else row.name)
    ]
    run_rows(experiment, rows, split, wait=not args.no_wait)


def run_rows(
    experiment: Experiment, rows: list[Row], split: str, wait: bool = True
) -> None:
    """Runs rows until all have a result, always the first that can be run."""
    while todo := [r for r in rows if not experiment.result_file(r, split).exists()]:
        if any(run_if_free(experiment, row, split) for row in todo):
            continue
        if not wait:
            return
        time.sleep(WAIT_S)


def run_if_free(experiment: Experiment, row: Row, split: str) -> bool:
    """Runs a row unless another process does or its base is missing."""
    if not experiment.is_ready(row):
        return False
    with _lock(experiment.work_dir / 'locks' / row.training) as free:
        # another process may have finished it in the meantime
        if not free or experiment.result_file(row, split).exists():
            return False
        print(f'{row.training}: {row.iters} iterations', flush=True)
        experiment.run(row, split)
    return True


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether this process has the lock; a killed process leaves it free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


if __name__ == '__main__':
    main()
