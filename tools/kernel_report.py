"""Prints what the compiled Triton kernels need and do, without a GPU.

    python tools/kernel_report.py
    python tools/kernel_report.py --arch 90 --head-dim 32 64 128 --dtype float32

Registers, spills, shared memory and tensor-core instructions are those of a whole
kernel; the counts per pair are instructions of the inner loop for one (query, key,
head) pair, at stage 1 of DAT-T++ on an 800 x 1333 image; where it multiplies the head
dimensions in parts, those loops count once. A second deform_attn_dkdv_kernel is the
launch for the gradients of the bias. The table of deform_sdpa
counts in the loop over points, for a lane and for one (query, point, head).
"""

import argparse

import torch

from deform_gqa.inspect import aot, sdpa_report
from deform_gqa.inspect.representative import attention, neighborhood, sampling

HEADER = (
    f'{"kernel":27} {"sm":>3} {"D":>4} {"dtype":>9} {"registers":>9} {"spills_B":>8} '
    f'{"shared_KiB":>10} {"mma":>4} {"per pair":>8}  of these'
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--arch', type=int, nargs='+', default=[80, 90])
    parser.add_argument('--head-dim', type=int, nargs='+', default=[32, 64])
    parser.add_argument(
        '--dtype',
        nargs='+',
        default=['bfloat16', 'float16'],
        choices=['bfloat16', 'float16', 'float32'],
    )
    return parser.parse_args()


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


def main() -> None:
    args = parse_args()
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
    dtypes = [getattr(torch, dtype) for dtype in args.dtype]
    sdpa_report.print_table(args.arch, args.head_dim, dtypes)


if __name__ == '__main__':
    main()
