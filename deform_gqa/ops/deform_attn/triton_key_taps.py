"""Positions of the keys in cells of the bias table, a tile of keys at a time.

    taps[b, g, tile, 0 or 1, i] = base + (1 - pos) * half      (y, then x)

is the table coordinate t of the query in row and column 0; a query adds its index
times the step. Written once a call, by ``triton_bias_inputs.py``, as the tiles of a
kernel read each value many times.
"""

import triton
import triton.language as tl


@triton.jit
def key_order(BN: tl.constexpr, NW: tl.constexpr):
    """Keys of a tile as the batched products see them.

    A product's batch is dealt out to the NW warps in turn; in this order the keys of
    one warp are neighbors, so that it moves whole vectors when the layout changes.
    """
    s = tl.arange(0, BN)
    return (s % NW) * (BN // NW) + s // NW


@triton.jit
def write_key_taps(
    p_taps, i_bg, o_s, m_s, t_y, t_x, num_keys, BN: tl.constexpr
):  # fmt: skip
    """Taps of keys o_s of one group, where tiles of ``BN`` keys look for them.

    Keys behind the last one of the last tile, and those at NaN, are too far out to
    touch the table.
    """
    num_tiles = tl.cdiv(num_keys, BN)
    p = p_taps + i_bg * num_tiles * (2 * BN) + o_s // BN * (2 * BN) + o_s % BN
    is_key = m_s & (t_y == t_y) & (t_x == t_x)
    in_tile = o_s < num_tiles * BN
    tl.store(p, tl.where(is_key, t_y, -1.0), mask=in_tile)
    tl.store(p + BN, tl.where(is_key, t_x, -1e30), mask=in_tile)


def taps_shape(pos: tuple[int, ...], tile: int) -> tuple[int, ...]:
    """(B, G, S, 2) -> (B, G, ceil(S / tile), 2, tile)."""
    batch, groups, keys, _ = pos
    return batch, groups, -(-keys // tile), 2, tile
