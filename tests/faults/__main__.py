"""Disturbs trainings in many ways and reports what was lost.

    python -m tests.faults [--trials 200] [--out tools/benchmark_results/faults]

A run that was stopped goes on where it was: trials in the report are not made again.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from rich.progress import track

from deform_gqa.datasets.coco import write_json
from tests.faults.trials import CLASSES, Trials

ROOT = Path(__file__).parents[2]


def markdown(report: dict) -> str:
    """A table with a line for each class of faults, and what was lost."""
    lines = [
        '# Faults while checkpoints are saved',
        '',
        'Made by `python -m tests.faults`. A small training saves within and after '
        'epochs, validates, and keeps its best file. It is disturbed and resumed. '
        'Lost is a trial after which a file cannot be read, the training cannot be '
        'resumed, or a file is missing or holds other weights than without the fault.',
        '',
        f'torch {report["torch"]}; {report["calls"]} file system calls in a training.',
        '',
        '| fault | trials | lost |',
        '|---|---:|---:|',
    ]
    for name, results in report['results'].items():
        lost = sum(bool(result) for result in results)
        lines.append(f'| {CLASSES[name]} | {len(results)} | {lost} |')
    for name, results in report['results'].items():
        lines += [f'- {name} {i}: {x}' for i, x in enumerate(results) if x]
    return '\n'.join(lines) + '\n'


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--trials', type=int, default=200, help='of each class')
    parser.add_argument('--classes', nargs='+', choices=CLASSES, default=[*CLASSES])
    default = ROOT / 'tools' / 'benchmark_results' / 'faults'
    parser.add_argument('--out', type=Path, default=default, help='folder')
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / 'faults.json'
    report = json.loads(file.read_text()) if file.is_file() else dict(results={})
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder))
        report.update(torch=torch.__version__, calls=trials.calls)
        for name in args.classes:
            results = report['results'].setdefault(name, [])
            left = range(len(results), args.trials)
            for number in track(left, name, transient=True):
                results.append(trials.run(name, number, args.trials))
                write_json(file, report)
    write_json(file, report)
    (args.out / 'faults.md').write_text(markdown(report), encoding='utf-8')
    print(markdown(report))
    return int(any(any(results) for results in report['results'].values()))


if __name__ == '__main__':
    raise SystemExit(main())
