"""Positions of the keys in cells of the bias table, a tile of keys at a time.

    taps[b, g, tile, 0 or 1, i] = base + (1 - pos) * half      (y, then x)

is the table coordinate t of the query in row and column 0; a query adds its index
times the step. Done once a call, as a tile of a kernel reads each value many times.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .patches import TableAxis


@triton.jit
def key_order(BN: tl.constexpr, NW: tl.constexpr):
    """Keys of a tile as the batched products see them.

    A product's batch is dealt out to the NW warps in turn; in this order the keys of
    one warp are neighbors, so that it moves whole vectors when the layout changes.
    """
    s = tl.arange(0, BN)
    return (s % NW) * (BN // NW) + s // NW


@triton.jit
def key_taps_kernel(
    p_pos, p_taps, stride_b, stride_g, stride_s, stride_c, groups, num_keys,
    half_y, half_x, base_y, base_x, BN: tl.constexpr,
):  # fmt: skip
    # All in x: the other dimensions of a grid end at 65535.
    num_tiles = tl.cdiv(num_keys, BN)
    i_tile, i_bg = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    i_b, i_g = (i_bg // groups).to(tl.int64), (i_bg % groups).to(tl.int64)
    o_s = i_tile * BN + tl.arange(0, BN)
    m_s = o_s < num_keys
    p_pos += i_b * stride_b + i_g * stride_g + o_s.to(tl.int64) * stride_s
    # (BN,)
    b_y = tl.load(p_pos, mask=m_s, other=1.0)
    b_x = tl.load(p_pos + stride_c, mask=m_s, other=1.0)
    p_taps += tl.program_id(0).to(tl.int64) * (2 * BN)
    p_taps += tl.arange(0, BN)
    t_y = base_y + (1.0 - b_y) * half_y
    t_x = base_x + (1.0 - b_x) * half_x
    # Keys behind the last one, and those at NaN, are too far out to touch the table.
    is_key = m_s & (t_y == t_y) & (t_x == t_x)
    tl.store(p_taps, tl.where(is_key, t_y, -1.0))
    tl.store(p_taps + BN, tl.where(is_key, t_x, -1e30))


def key_taps(pos: Tensor, y: TableAxis, x: TableAxis, tile: int) -> Tensor:
    """(B, G, S, 2) -> (B, G, ceil(S / tile), 2, tile)."""
    batch, groups, keys, _ = pos.shape
    tiles = math.ceil(keys / tile)
    taps = pos.new_empty((batch, groups, tiles, 2, tile), dtype=torch.float32)
    key_taps_kernel[(tiles * batch * groups,)](
        pos,
        taps,
        *pos.stride(),
        groups,
        keys,
        y.half,
        x.half,
        y.base,
        x.base,
        BN=tile,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return taps
