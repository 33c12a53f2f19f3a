"""Block sizes of the deform_attn kernels."""

import dataclasses

import torch

from ..common import block_sizes as common
from ..common.block_sizes import BlockSizes, Table, pad_head_dim
from .patches import MAX_WINDOW, MIN_WINDOW

# Chosen ahead of time by instructions a pair, registers and shared memory of the
# compiled code: the largest tiles without spills, also where positions may be out of
# range (tools/kernel_report.py prints them).
TABLE: Table = {
    ('deform_attn_fwd', 2, 90): {
        32: BlockSizes(256, 64, 16, 1),
        64: BlockSizes(256, 64, 16, 1),
        128: BlockSizes(128, 64, 8, 1),
        256: BlockSizes(64, 64, 8, 1),
    },
    ('deform_attn_fwd', 2, 80): {
        32: BlockSizes(256, 64, 8, 2),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dq', 2, 90): {
        32: BlockSizes(256, 64, 16, 1),
        64: BlockSizes(256, 32, 16, 1),
        128: BlockSizes(128, 64, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dq', 2, 80): {
        32: BlockSizes(256, 32, 8, 2),
        64: BlockSizes(256, 16, 8, 2),
        128: BlockSizes(64, 64, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dkdv', 2, 90): {
        32: BlockSizes(256, 32, 8, 1),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dbias', 2, 90): {
        32: BlockSizes(256, 16, 8, 1),
        64: BlockSizes(256, 16, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(128, 16, 8, 1),
    },
    ('deform_attn_dkdv_dbias', 2, 90): {
        32: BlockSizes(256, 32, 8, 1),
        64: BlockSizes(256, 16, 8, 1),
    },
    ('deform_attn_dkdv_dbias_by_warp', 2, 90): {
        32: BlockSizes(256, 16, 8, 1),
    },
    ('deform_attn_fwd', 2, 100): {
        32: BlockSizes(256, 64, 8, 1),
        64: BlockSizes(256, 64, 8, 1),
    },
    ('deform_attn_dq', 2, 100): {
        32: BlockSizes(256, 32, 8, 1),
        64: BlockSizes(256, 32, 8, 1),
    },
    ('deform_attn_dkdv_dbias', 2, 100): {
        32: BlockSizes(256, 16, 8, 1),
        64: BlockSizes(128, 16, 8, 1),
    },
    ('deform_attn_dkdv', 2, 80): {
        32: BlockSizes(256, 32, 8, 1),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dbias', 2, 80): {
        32: BlockSizes(256, 16, 8, 1),
        64: BlockSizes(256, 16, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_dkdv_dbias', 2, 80): {
        32: BlockSizes(256, 16, 8, 1),
        64: BlockSizes(256, 16, 8, 1),
    },
    ('deform_attn_dkdv_dbias_by_warp', 2, 80): {
        32: BlockSizes(256, 16, 8, 1),
    },
    ('deform_attn_fwd', 4, 90): {
        32: BlockSizes(128, 32, 8, 1),
        64: BlockSizes(128, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(32, 16, 8, 1),
    },
    ('deform_attn_fwd', 4, 80): {
        16: BlockSizes(128, 16, 8, 1),
        32: BlockSizes(128, 32, 8, 1),
        64: BlockSizes(128, 32, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_dq', 4, 90): {
        32: BlockSizes(128, 32, 8, 1),
        64: BlockSizes(128, 32, 8, 1),
        128: BlockSizes(64, 32, 8, 1),
        256: BlockSizes(32, 16, 8, 1),
    },
    ('deform_attn_dq', 4, 80): {
        32: BlockSizes(128, 16, 8, 1),
        64: BlockSizes(128, 16, 8, 1),
        128: BlockSizes(64, 16, 8, 1),
        256: BlockSizes(32, 16, 8, 1),
    },
    ('deform_attn_dkdv', 4, 90): {
        32: BlockSizes(64, 16, 4, 1),
        64: BlockSizes(64, 16, 8, 1),
        128: BlockSizes(32, 32, 8, 1),
        256: BlockSizes(16, 16, 8, 1),
    },
    ('deform_attn_dbias', 4, 90): {
        32: BlockSizes(128, 16, 8, 1),
        64: BlockSizes(128, 16, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(128, 16, 8, 1),
    },
    ('deform_attn_dkdv', 4, 80): {
        32: BlockSizes(64, 16, 4, 1),
        64: BlockSizes(64, 16, 8, 1),
        128: BlockSizes(32, 32, 8, 1),
        256: BlockSizes(16, 16, 8, 1),
    },
    ('deform_attn_dbias', 4, 80): {
        32: BlockSizes(128, 16, 8, 1),
        64: BlockSizes(128, 16, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(128, 16, 8, 1),
    },
}


@dataclasses.dataclass(frozen=True)
class Features:
    """What a call asks of the kernels beyond the plain product.

    Attributes:
        window: Table columns that 16 queries reach from one key; more of a fine table,
            MIN_WINDOW without a bias.
        bias: Whether there is a table.
        dropout: Whether weights are dropped.
        deterministic: Whether sums are in fixed point.
    """

    window: int = MIN_WINDOW
    bias: bool = True
    dropout: bool = False
    deterministic: bool = False

    @property
    def fine_table(self) -> bool:
        return self.window > MIN_WINDOW


PLAIN = Features()


def block_sizes(
    kernel: str,
    head_dim: int,
    dtype: torch.dtype,
    arch: int,
    features: Features = PLAIN,
) -> BlockSizes:
    """Sizes of one kernel; smaller where a fine table or dropout take room.

    Args:
        kernel: 'deform_attn_fwd', 'deform_attn_dq', 'deform_attn_dkdv' (gradients of k
            and v), 'deform_attn_dbias' (of pos and the table),
            'deform_attn_dkdv_dbias' (all four, of 16-bit inputs with D <= 64), or
            'deform_attn_dkdv_dbias_by_warp' (the same, with D <= 32).
        head_dim: D, 8 to 256.
        dtype: dtype of q.
        arch: Compute capability as 80 or 90.
        features: Of the call.
    """
    sizes = common.tabled_sizes(TABLE, kernel, head_dim, dtype, arch)
    # Masked dimensions and sums in fixed point take registers.
    takes_more = head_dim != pad_head_dim(head_dim) or features.deterministic
    if kernel == 'deform_attn_dkdv_dbias' and takes_more:
        sizes = dataclasses.replace(sizes, keys=16)
    sizes = _for_table(sizes, kernel, features.window)
    if common.has_small_shared_memory(arch):
        # Keys are what its share in shared memory grows with, for each stage.
        sizes = dataclasses.replace(sizes, keys=min(sizes.keys, 32), stages=1)
    if features.dropout:
        return _for_dropout(sizes)
    # Without a bias the tiles of 16-bit keys may be twice as large.
    is_small = head_dim <= 64 and dtype.itemsize == 2
    if kernel == 'deform_attn_dkdv' and is_small and not features.bias:
        return dataclasses.replace(sizes, keys=2 * sizes.keys)
    return sizes


def _for_table(sizes: BlockSizes, kernel: str, window: int) -> BlockSizes:
    """Tiles of keys hold as many columns of the table for each key."""
    fewest_keys = 8 if kernel == 'deform_attn_dbias' or sizes.warps == 4 else 16
    fewest_queries = 64 if window < MAX_WINDOW else 16
    if window > MIN_WINDOW:  # smaller tiles need fewer warps
        sizes = dataclasses.replace(sizes, warps=min(sizes.warps, 8))
    while window > MIN_WINDOW:
        window //= 2
        if sizes.keys > fewest_keys:
            sizes = dataclasses.replace(sizes, keys=sizes.keys // 2, stages=1)
        elif sizes.queries > fewest_queries:
            sizes = dataclasses.replace(sizes, queries=sizes.queries // 2, stages=1)
    return sizes


def _for_dropout(sizes: BlockSizes) -> BlockSizes:
    sizes = dataclasses.replace(sizes, stages=1)
    if sizes.keys > 16:
        return dataclasses.replace(sizes, keys=sizes.keys // 2)
    if sizes.queries == 64:  # more queries have registers left
        return dataclasses.replace(sizes, queries=32, warps=8)
    return sizes


def fuses_bias_gradient(
    head_dim: int, dtype: torch.dtype, features: Features = PLAIN
) -> bool:
    """Whether one kernel fits the gradients of k, v, pos and table.

    Dropout, fine tables and masked sums in fixed point take its registers.
    """
    if head_dim != pad_head_dim(head_dim) and features.deterministic:
        return False
    fits = dtype.itemsize == 2 and head_dim <= 64
    return fits and not features.fine_table and not features.dropout
