"""Prints what the compiled Triton kernels need and do, without a GPU.

    python tools/kernel_report.py
    python tools/kernel_report.py --tables layers --arch 90 --json after.json
    python tools/kernel_report.py --compare before.json after.json

Table 'layers': the kernels of deform_attn as the D layers of DAT-T++ launch them, at
all four stages and two image sizes, with the clocks that they keep each pipe of a
multiprocessor busy, and a bound of their time from that (deform_gqa/inspect/pipes.py).
Table 'kernels': registers, spills, shared memory and tensor-core instructions of whole
kernels; the counts per pair are instructions of the inner loop for one (query, key,
head) pair, at stage 1 on an 800 x 1333 image; where it multiplies the head dimensions
in parts, those loops count once. A second deform_attn_dkdv_kernel is the launch for the
gradients of the bias. Table 'points': deform_sdpa's loop over points, for a lane and
for one (query, point, head). Table 'samples': ms_deform_attn, for a sample of a head,
and beside it msda-triton where MSDA_TRITON names a folder that it is installed in.

``--compare`` compiles nothing and fails if a kernel got more registers, spills or
instructions.
"""

import argparse
import pathlib

import torch

from deform_gqa.inspect import aot, layer_table, ms_deform_report, sdpa_report
from deform_gqa.inspect.representative import attention, neighborhood, sampling

TABLES = ('layers', 'kernels', 'points', 'samples')
HEADER = (
    f'{"kernel":27} {"sm":>3} {"D":>4} {"dtype":>9} {"registers":>9} {"spills_B":>8} '
    f'{"shared_KiB":>10} {"mma":>4} {"per pair":>8}  of these'
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--tables', nargs='+', default=TABLES, choices=TABLES)
    parser.add_argument('--arch', type=int, nargs='+', default=[80, 90])
    parser.add_argument('--head-dim', type=int, nargs='+', default=[32, 64])
    parser.add_argument(
        '--dtype',
        nargs='+',
        default=['bfloat16', 'float16'],
        choices=['bfloat16', 'float16', 'float32'],
    )
    parser.add_argument(
        '--json', type=pathlib.Path, help="file for what table 'layers' reports"
    )
    parser.add_argument(
        '--compare',
        type=pathlib.Path,
        nargs=2,
        metavar=('BEFORE', 'AFTER'),
        help='two such files',
    )
    args = parser.parse_args()
    if args.json and 'layers' not in args.tables:
        parser.error("--json saves table 'layers', which --tables leaves out")
    return args


def print_report(report: aot.KernelReport, head_dim: int | str, dtype: str) -> None:
    counts = dict(report.per_pair)
    total = f'{counts.pop("all"):.1f}' if counts else '-'
    parts = ', '.join(f'{kind} {count:.2f}' for kind, count in sorted(counts.items()))
    print(
        f'{report.name:27} {report.arch:3} {head_dim:>4} {dtype:>9} '
        f'{report.registers:9} {report.stack_bytes + report.local_bytes:8} '
        f'{report.shared_bytes / 1024:10.1f} {report.tensor_core:4} {total:>8}  '
        f'{parts}',
        flush=True,
    )


def print_kernels(args: argparse.Namespace) -> None:
    print(HEADER)
    for arch in args.arch:
        for dtype in args.dtype:
            for head_dim in args.head_dim:
                launches = [
                    *attention(arch, head_dim, getattr(torch, dtype)),
                    *neighborhood(arch, head_dim, getattr(torch, dtype)),
                ]
                for launch in launches:
                    report = aot.report_launch(launch, arch)
                    print_report(report, head_dim, dtype)
            for launch in sampling(arch, getattr(torch, dtype)):
                print_report(aot.report_launch(launch, arch), '-', dtype)


def compare(before: pathlib.Path, after: pathlib.Path) -> int:
    """Prints what got worse; the exit code."""
    lines = layer_table.worsened(before, after)
    print('\n'.join(lines) or 'No kernel got more registers, spills or instructions.')
    return 1 if lines else 0


def main() -> int:
    args = parse_args()
    if args.compare:
        return compare(*args.compare)
    dtypes = [getattr(torch, dtype) for dtype in args.dtype]
    if 'layers' in args.tables:
        entries = layer_table.print_layers(args.arch, args.head_dim, dtypes)
        if args.json:
            layer_table.save(entries, args.json)
    if 'kernels' in args.tables:
        print_kernels(args)
    if 'points' in args.tables:
        sdpa_report.print_table(args.arch, args.head_dim, dtypes)
    if 'samples' in args.tables:
        ms_deform_report.print_table(args.arch, dtypes)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
