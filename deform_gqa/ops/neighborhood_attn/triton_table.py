"""Spreads rpb so that the biases of a (patch, walked tile) pair are one aligned load.

    table[h, slab, dy, c, w] = rpb[h, y + K - 1, x + K - 1] / scale, or -inf
    y = dy - (R + K - 2)             offset of the walked row from the owned one
    x = w - c + jx * WC - K // 2     offset of the walked column from the owned one

(both negated where the patch owns keys). Slab 0, jx = 0, hides all beyond K // 2: it
has the windows of inner patches. Slabs 1 to 3, jx = -1 to 1, hold all offsets; the
kernels hide what clamped windows do not hold. Kernel notation in
``triton_windows.py``. A slab takes about 14 KiB, whatever the map's size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .patches import NeighborhoodTile

SLABS = 4


@triton.jit(do_not_specialize=["kernel_size"])  # fmt: skip
def neighborhood_table_kernel(
    p_rpb, p_table, stride_h, stride_y, stride_x, kernel_size, sign, factor,
    R: tl.constexpr, C: tl.constexpr, WR: tl.constexpr, WC: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = 2 * (R + kernel_size - 2) + WR
    per_slab = rows * (C * WC)
    num_programs = tl.cdiv(per_slab, BLOCK)
    o = tl.program_id(0) % num_programs * BLOCK + tl.arange(0, BLOCK)
    # All in x: the other dimensions of a grid end at 65535.
    i_slab = tl.program_id(0) // num_programs
    slab = i_slab % 4
    i_h = (i_slab // 4).to(tl.int64)
    jx = tl.where(slab == 0, 0, slab - 2)
    half = kernel_size // 2
    y = o // (C * WC) - (R + kernel_size - 2)
    x = o % WC - (o // WC) % C + jx * WC - half
    reach = tl.where(slab == 0, half, kernel_size - 1)
    inside = (tl.abs(y) <= reach) & (tl.abs(x) <= reach)
    b = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        o_y = (y * sign + kernel_size - 1).to(tl.int64) * stride_y
        o_x = (x * sign + kernel_size - 1).to(tl.int64) * stride_x
        p = p_rpb + i_h * stride_h + o_y + o_x
        # (BLOCK,)
        b = tl.load(p, mask=inside & (o < per_slab), other=0.0).to(tl.float32) * factor
    b = tl.where(inside, b, -float('inf'))
    p = p_table + i_slab.to(tl.int64) * per_slab + o
    tl.store(p, b, mask=o < per_slab)


def neighborhood_table(
    rpb: Tensor | None,
    tile: NeighborhoodTile,
    kernel_size: int,
    scale: float,
    owns_keys: bool,
    device: torch.device,
) -> Tensor:
    """float32 (Hq or 1, 4, rows, cols of the patch, walk_cols).

    Args:
        rpb: (Hq, 2K - 1, 2K - 1); None for zeros, one for all heads.
        scale: Of the logits, positive.
        owns_keys: Whether the patch is one of keys.
    """
    heads = 1 if rpb is None else rpb.shape[0]
    rows = 2 * (tile.rows + kernel_size - 2) + tile.walk_rows
    table = torch.empty(
        (heads, SLABS, rows, tile.cols, tile.walk_cols),
        dtype=torch.float32,
        device=device,
    )
    block = 4096
    programs = triton.cdiv(table[0, 0].numel(), block) * heads * SLABS
    neighborhood_table_kernel[(programs,)](
        rpb,
        table,
        *((0, 0, 0) if rpb is None else rpb.stride()),
        kernel_size,
        -1 if owns_keys else 1,
        1 / scale,
        R=tile.rows,
        C=tile.cols,
        WR=tile.walk_rows,
        WC=tile.walk_cols,
        HAS_BIAS=rpb is not None,
        BLOCK=block,
        # The default up to Triton 3.9 only.
        enable_fp_fusion=True,
    )
    return table
