"""Measure ops, layers, backbones, detectors and data: time, memory, FLOPs.

Examples:
    python tools/benchmark.py op --quick
    python tools/benchmark.py op deform_attn --sizes 800x1333 --stages 1 --threads 1 \\
        --backends naive torch --out work_dirs/benchmark
    python tools/benchmark.py layer DeformableGQA --stages 2 3 --backends naive torch
    python tools/benchmark.py backbone t++ --sizes 480x640 --breakdown
    python tools/benchmark.py detector mmdet::retinanet/retinanet_r50_fpn_1x_coco.py
    python tools/benchmark.py gqa-sweep deform_sdpa --out work_dirs/benchmark
    python tools/benchmark.py dataloader CONFIG --workers 0 1 2
    python tools/benchmark.py compare BEFORE.json AFTER.json

``python tools/benchmark.py SUITE --help`` lists the options of a suite.
tools/benchmark_results/README.md says how to read what comes out.
"""

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence

from deform_gqa.benchmark.core.errors import GateError, OptionError
from deform_gqa.benchmark.core.options import Parser

# Modules with DESCRIPTION, add_arguments(parser) and run(args, command); each is
# imported only when it is named, so that a suite needs its own packages alone.
SUITES = {
    'op': 'deform_gqa.benchmark.ops.suite',
    'layer': 'deform_gqa.benchmark.models.layer',
    'backbone': 'deform_gqa.benchmark.models.backbone',
    'detector': 'deform_gqa.benchmark.models.detector',
    'gqa-sweep': 'deform_gqa.benchmark.gqa_sweep',
    'dataloader': 'deform_gqa.benchmark.dataloader',
    'compare': 'deform_gqa.benchmark.compare',
    'hook-overhead': 'deform_gqa.benchmark.models.hook_overhead',
}
EXIT_WRONG_RESULTS = 1
EXIT_BAD_OPTION = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog='benchmark.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('suite', choices=SUITES)
    name = SUITES[parser.parse_args(argv[:1]).suite]
    try:
        suite = importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or '').split('.')[0]
        if package in ('', 'deform_gqa'):
            raise
        message = f'needs the package {package}, which is not installed'
        print(f'benchmark.py {argv[0]}: error: {message}', file=sys.stderr)
        return EXIT_BAD_OPTION
    parser = Parser(prog=f'benchmark.py {argv[0]}', description=suite.DESCRIPTION)
    suite.add_arguments(parser)
    try:
        args = parser.parse_args(argv[1:])
        code = suite.run(args, shlex.join(['python', 'tools/benchmark.py', *argv]))
    except OptionError as error:
        print(f'{parser.prog}: error: {error}', file=sys.stderr)
        return EXIT_BAD_OPTION
    except GateError as error:
        print(f'{parser.prog}: nothing reported: {error}', file=sys.stderr)
        return EXIT_WRONG_RESULTS
    return 0 if code is None else code


if __name__ == '__main__':
    sys.exit(main())
