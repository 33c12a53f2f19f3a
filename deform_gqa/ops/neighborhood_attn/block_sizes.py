"""Block sizes of the neighborhood_attn kernels."""

import dataclasses

import torch

from ..common import block_sizes as common
from ..common.block_sizes import BlockSizes, Table

# Chosen ahead of time by instructions a pair, registers and shared memory of the
# compiled code: the largest tiles without spills (tools/kernel_report.py prints them).
TABLE: Table = {
    ('neighborhood_fwd', 2, 90): {
        32: BlockSizes(64, 64, 4, 1),
        64: BlockSizes(64, 64, 4, 1),
        128: BlockSizes(64, 64, 4, 1),
        256: BlockSizes(64, 64, 4, 1),
    },
    ('neighborhood_dq', 2, 90): {
        32: BlockSizes(64, 64, 4, 1),
        64: BlockSizes(64, 64, 4, 1),
        128: BlockSizes(64, 32, 4, 1),
        256: BlockSizes(64, 32, 4, 1),
    },
    ('neighborhood_dkdv', 2, 90): {
        32: BlockSizes(64, 64, 4, 1),
        64: BlockSizes(32, 64, 4, 1),
        128: BlockSizes(16, 32, 4, 1),
        256: BlockSizes(16, 64, 4, 1),
    },
    ('neighborhood_dkdv', 2, 100): {64: BlockSizes(32, 32, 4, 1)},
    ('neighborhood_fwd', 2, 80): {
        32: BlockSizes(64, 64, 4, 1),
        64: BlockSizes(64, 64, 4, 1),
        128: BlockSizes(64, 32, 4, 1),
        256: BlockSizes(64, 64, 4, 1),
    },
    ('neighborhood_dq', 2, 80): {
        32: BlockSizes(64, 64, 4, 1),
        64: BlockSizes(64, 32, 4, 1),
        128: BlockSizes(64, 32, 4, 1),
        256: BlockSizes(64, 64, 4, 1),
    },
    ('neighborhood_dkdv', 2, 80): {
        32: BlockSizes(32, 64, 4, 1),
        64: BlockSizes(16, 64, 4, 1),
        128: BlockSizes(16, 32, 4, 1),
        256: BlockSizes(16, 64, 4, 1),
    },
    ('neighborhood_fwd', 4, 90): {
        32: BlockSizes(64, 32, 4, 1),
        64: BlockSizes(128, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(128, 32, 8, 1),
    },
    ('neighborhood_dq', 4, 90): {
        32: BlockSizes(64, 32, 4, 1),
        64: BlockSizes(64, 64, 4, 1),
        128: BlockSizes(64, 64, 4, 1),
        256: BlockSizes(64, 64, 4, 1),
    },
    ('neighborhood_dkdv', 4, 90): {
        32: BlockSizes(16, 64, 4, 1),
        64: BlockSizes(32, 64, 4, 1),
        128: BlockSizes(32, 64, 4, 1),
        256: BlockSizes(32, 64, 4, 1),
    },
    ('neighborhood_fwd', 4, 80): {
        32: BlockSizes(64, 32, 4, 1),
        64: BlockSizes(64, 32, 4, 1),
        128: BlockSizes(64, 32, 4, 1),
        256: BlockSizes(64, 32, 4, 1),
    },
    ('neighborhood_dq', 4, 80): {
        32: BlockSizes(64, 32, 4, 1),
        64: BlockSizes(64, 32, 4, 1),
        128: BlockSizes(64, 32, 4, 1),
        256: BlockSizes(64, 32, 4, 1),
    },
    ('neighborhood_dkdv', 4, 80): {
        32: BlockSizes(16, 32, 4, 1),
        64: BlockSizes(16, 64, 4, 1),
        128: BlockSizes(16, 64, 4, 1),
        256: BlockSizes(16, 64, 4, 1),
    },
}


def block_sizes(
    kernel: str,
    head_dim: int,
    dtype: torch.dtype,
    arch: int,
    dropout: bool = False,
) -> BlockSizes:
    """Sizes of one kernel; smaller where random numbers would not fit into registers.

    Args:
        kernel: 'neighborhood_fwd', 'neighborhood_dq' or 'neighborhood_dkdv'.
        head_dim: D, 8 to 256.
        dtype: dtype of q.
        arch: Compute capability as 80 or 90.
        dropout: Whether weights are dropped.
    """
    sizes = common.tabled_sizes(TABLE, kernel, head_dim, dtype, arch)
    if not dropout:
        return sizes
    queries = sizes.queries // 2 if kernel == 'neighborhood_dkdv' else sizes.queries
    keys = max(16, sizes.keys // 2)
    return dataclasses.replace(sizes, queries=max(16, queries), keys=keys, warps=8)


def fuses_bias_gradient(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether one kernel fits the gradients of q and rpb."""
    return dtype.itemsize == 2 and head_dim <= 64
