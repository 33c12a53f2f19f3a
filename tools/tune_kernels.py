"""Measures block sizes on this machine's GPU and writes the best ones.

    python tools/tune_kernels.py
    python tools/tune_kernels.py --head-dim 32 64 --dtype bfloat16 --dry-run

Needs torch and triton alone; where the package is not installed, run it from the
repository's root with PYTHONPATH=. set. One head dimension and dtype takes a few
minutes, most of which compiles.

Writes ``block_sizes.json`` beside ``deform_gqa/ops/common/block_sizes.py``
after each kernel, whose entries for this architecture go before the built-in table
from then on; all other entries are kept. Delete the file to go back.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
from unittest import mock

import torch
import triton
from triton.runtime.errors import OutOfResources

from deform_gqa.ops.common import block_sizes
from deform_gqa.ops.common.block_sizes import (
    OVERRIDES,
    BlockSizes,
    override_key,
    pad_head_dim,
    tabled_sizes,
)
from deform_gqa.ops.common.triton_host import architecture, launches_anew
from deform_gqa.ops.deform_attn.block_sizes import fuses_bias_gradient
from deform_gqa.ops.deform_attn.triton_launch import (
    BY_WARP_HEAD_DIMS,
    deform_attn_backward,
    deform_attn_forward,
)
from deform_gqa.ops.neighborhood_attn.triton_launch import (
    neighborhood_attn_backward,
    neighborhood_attn_forward,
)

# Queries * keys / lanes: less leaves the lanes idle, more does not fit registers.
FEWEST_PAIRS, MOST_PAIRS = 8, 64
# Stage 3 of DAT-T++ on an 800 x 1333 image: half of the pairs of the whole backbone.
GRID_SIZE, KEYS, HEADS, GROUPS, TABLE_SIZE = (50, 84), 1050, 8, 4, (27, 27)
KERNEL_SIZE = 7
NEIGHBORHOOD_OPS = ['neighborhood_fwd', 'neighborhood_dq', 'neighborhood_dkdv']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--head-dim', type=int, nargs='+', default=[32])
    parser.add_argument(
        '--dtype',
        nargs='+',
        default=['bfloat16', 'float16', 'float32'],
        choices=['bfloat16', 'float16', 'float32'],
    )
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--dry-run', action='store_true', help='print, write nothing')
    return parser.parse_args()


def ops_of(head_dim: int, dtype: torch.dtype) -> list[str]:
    """The kernels of calls with a bias and without dropout."""
    if fuses_bias_gradient(head_dim, dtype):
        by_warp = '_by_warp' if head_dim in BY_WARP_HEAD_DIMS else ''
        for_keys = [f'deform_attn_dkdv_dbias{by_warp}']
    else:
        for_keys = ['deform_attn_dkdv', 'deform_attn_dbias']
    return ['deform_attn_fwd', 'deform_attn_dq', *for_keys, *NEIGHBORHOOD_OPS]


def candidates() -> list[BlockSizes]:
    every = itertools.product((16, 32, 64, 128, 256), (16, 32, 64), (4, 8, 16), (1, 2))
    return [
        BlockSizes(queries, keys, warps, stages)
        for queries, keys, warps, stages in every
        if FEWEST_PAIRS <= queries * keys / (32 * warps) <= MOST_PAIRS
    ]


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device='cuda').to(dtype)


def make_call(op: str, head_dim: int, dtype: torch.dtype, batch: int):
    """A function of no arguments that runs the forward or the backward kernels."""
    queries = math.prod(GRID_SIZE)
    options = dict(seed=0, grid_size=GRID_SIZE, scale=head_dim**-0.5, dropout_p=0.0)
    if op in NEIGHBORHOOD_OPS:
        forward, backward = neighborhood_attn_forward, neighborhood_attn_backward
        options.update(kernel_size=KERNEL_SIZE, dilation=1)
        keys = queries
        side = 2 * KERNEL_SIZE - 1
        bias = [draw(HEADS, side, side, dtype=torch.float32)]
    else:
        forward, backward = deform_attn_forward, deform_attn_backward
        options.update(pos_in_range=True)
        keys = KEYS
        pos = torch.rand(batch, GROUPS, KEYS, 2, device='cuda') * 2 - 1
        bias = [pos, draw(HEADS, *TABLE_SIZE, dtype=torch.float32)]
    q = draw(batch, HEADS, queries, head_dim, dtype=dtype)
    k, v = (draw(batch, HEADS, keys, head_dim, dtype=dtype) for _ in range(2))
    if op.endswith('_fwd'):
        return lambda: forward(q, k, v, *bias, **options)
    out, lse = forward(q, k, v, *bias, **options)
    return lambda: backward(q, out, lse, q, k, v, *bias, **options)


def time_ms(call, op: str, sizes: BlockSizes) -> float:
    """Median time with ``sizes`` for one op; infinite if they do not fit the GPU."""

    def choose(table, kernel, *args):
        return sizes if kernel == op else tabled_sizes(table, kernel, *args)

    with mock.patch.object(block_sizes, 'tabled_sizes', choose), launches_anew():
        try:
            return triton.testing.do_bench(call, return_mode='median')
        except OutOfResources:
            return float('inf')


def tune(op: str, head_dim: int, dtype: torch.dtype, batch: int) -> BlockSizes:
    call = make_call(op, head_dim, dtype, batch)
    timed = [(time_ms(call, op, sizes), sizes) for sizes in candidates()]
    for ms, sizes in sorted(timed, key=lambda x: x[0])[:3]:
        print(f'{op} D={head_dim} {dtype}: {ms:.3f} ms {sizes}', flush=True)
    ms, best = min(timed, key=lambda x: x[0])
    if ms == float('inf'):
        raise SystemExit(f'no block sizes of {op} fit this GPU at D={head_dim} {dtype}')
    return best


def read_overrides(path: pathlib.Path) -> dict[str, dict]:
    return json.loads(path.read_text()) if path.is_file() else {}


def write_overrides(path: pathlib.Path, entries: dict[str, dict]) -> None:
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + '\n')


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        raise SystemExit('tune_kernels.py needs an NVIDIA GPU; none was found')
    arch = architecture(torch.device('cuda', torch.cuda.current_device()))
    found = read_overrides(OVERRIDES)
    for dtype_name, head_dim in itertools.product(args.dtype, args.head_dim):
        dtype = getattr(torch, dtype_name)
        for op in ops_of(head_dim, dtype):
            best = tune(op, head_dim, dtype, args.batch)
            key = override_key(op, pad_head_dim(head_dim), dtype, arch)
            found[key] = dataclasses.asdict(best)
            if not args.dry_run:
                write_overrides(OVERRIDES, found)
    print(json.dumps(found, indent=2, sort_keys=True))


if __name__ == '__main__':
    main()
