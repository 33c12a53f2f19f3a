"""Measures block sizes on this machine's GPU and writes the best ones.

    python tools/tune_kernels.py
    python tools/tune_kernels.py --head-dim 32 64 --dtype bfloat16 --dry-run

Writes ``block_sizes.json`` beside ``deform_gqa/ops/triton_backend/block_sizes.py``,
whose entries for this architecture go before the built-in table from then on; entries
of other architectures are kept. Delete the file to go back.
"""

import argparse
import dataclasses
import itertools
import json
from unittest import mock

import torch
import triton
from triton.runtime.errors import OutOfResources

from deform_gqa.ops.triton_backend import (
    deform_attn_backward,
    deform_attn_forward,
    problem,
)
from deform_gqa.ops.triton_backend.block_sizes import (
    OVERRIDES,
    BlockSizes,
    block_sizes,
    override_key,
    pad_head_dim,
)

OPS = ('deform_attn_fwd', 'deform_attn_dq', 'deform_attn_dkdv')
# Stage 3 of DAT-T++ on an 800 x 1333 image: half of the pairs of the whole backbone.
GRID_SIZE, KEYS, HEADS, GROUPS, TABLE_SIZE = (50, 84), 1050, 8, 4, (27, 27)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--head-dim', type=int, nargs='+', default=[32, 64])
    parser.add_argument(
        '--dtype',
        nargs='+',
        default=['bfloat16', 'float16', 'float32'],
        choices=['bfloat16', 'float16', 'float32'],
    )
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--dry-run', action='store_true', help='print, write nothing')
    return parser.parse_args()


def candidates(op: str) -> list[BlockSizes]:
    keys = (16, 32, 64, 128) if op != 'deform_attn_dkdv' else (16, 32, 64)
    return [
        BlockSizes(*sizes)
        for sizes in itertools.product((64, 128, 256), keys, (4, 8), (1, 2))
    ]


def make_call(op: str, head_dim: int, dtype: torch.dtype, batch: int):
    """A function of no arguments that runs the forward or the backward kernels."""

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, device='cuda').to(dtype)

    q = draw(batch, HEADS, GRID_SIZE[0] * GRID_SIZE[1], head_dim)
    k, v = (draw(batch, HEADS, KEYS, head_dim) for _ in range(2))
    pos = torch.rand(batch, GROUPS, KEYS, 2, device='cuda') * 2 - 1
    table = draw(HEADS, *TABLE_SIZE, dtype=torch.float32)
    options = dict(
        seed=0,
        grid_size=GRID_SIZE,
        scale=head_dim**-0.5,
        dropout_p=0.0,
        pos_in_range=True,
    )
    if op == 'deform_attn_fwd':
        return lambda: deform_attn_forward(q, k, v, pos, table, **options)
    out, lse = deform_attn_forward(q, k, v, pos, table, **options)
    return lambda: deform_attn_backward(q, out, lse, q, k, v, pos, table, **options)


def time_ms(call, op: str, sizes: BlockSizes) -> float:
    """Median time with ``sizes`` for one op; infinite if they do not fit the GPU."""

    def choose(name, *args):
        return sizes if name == op else block_sizes(name, *args)

    with mock.patch.object(problem, 'block_sizes', choose):
        try:
            return triton.testing.do_bench(call, return_mode='median')
        except OutOfResources:
            return float('inf')


def tune(op: str, head_dim: int, dtype: torch.dtype, batch: int) -> BlockSizes:
    call = make_call(op, head_dim, dtype, batch)
    timed = [(time_ms(call, op, sizes), sizes) for sizes in candidates(op)]
    for ms, sizes in sorted(timed, key=lambda x: x[0])[:3]:
        print(f'{op} D={head_dim} {dtype}: {ms:.3f} ms {sizes}', flush=True)
    return min(timed, key=lambda x: x[0])[1]


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        raise SystemExit('tune_kernels.py needs an NVIDIA GPU; none was found')
    arch = problem.architecture(torch.device('cuda', torch.cuda.current_device()))
    found = json.loads(OVERRIDES.read_text()) if OVERRIDES.is_file() else {}
    for dtype_name, head_dim, op in itertools.product(args.dtype, args.head_dim, OPS):
        dtype = getattr(torch, dtype_name)
        best = tune(op, head_dim, dtype, args.batch)
        key = override_key(op, pad_head_dim(head_dim), dtype, arch)
        found[key] = dataclasses.asdict(best)
    if args.dry_run:
        print(json.dumps(found, indent=2, sort_keys=True))
        return
    OVERRIDES.write_text(json.dumps(found, indent=2, sort_keys=True) + '\n')
    print(f'wrote {OVERRIDES}')


if __name__ == '__main__':
    main()
