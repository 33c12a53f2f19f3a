"""Bilinear points of deform_sdpa: addresses and weights once, corners by wide loads.

Kernel notation, beside that of ``ops/__init__.py``::

    BQ   queries of a tile        BR   query heads of a tile, of one stack
    DP   D, padded to a power of two
    stack  a run of query heads that share kv head and offset group

A (BR, BQ, DP) tile lies so that a lane holds VEC channels, the lanes of a program
span (BQ, DP) and heads are registers: what is sampled is shared by the heads without
a move. As nothing is shared between warps, a program is one warp: no barriers.
A corner outside the map has weight 0 and is read from the border, so no load of a
map has a mask; a NaN or an infinity there reaches such points.
"""

import triton
import triton.language as tl


@triton.jit
def stride_of(steps, STEP: tl.constexpr):
    """A stride from its number of STEPs: so the compiler knows what divides it."""
    return steps.to(tl.int64) * STEP


@triton.jit
def axis_pixels(at, size):
    """Two neighboring pixels on the map, their weights, and 1.0 where inside.

    Args:
        at: (BQ,) coordinate in [0, 1].
    """
    # Far outside is as good as outside, and safe to convert to an integer.
    at = tl.clamp(at * (size - 1).to(tl.float32), -2.0, size + 1.0)
    cell = tl.floor(at)
    fraction = at - cell
    first = cell.to(tl.int32)
    second = first + 1
    inside_1 = ((first >= 0) & (first < size)).to(tl.float32)
    inside_2 = ((second >= 0) & (second < size)).to(tl.float32)
    first = tl.minimum(tl.maximum(first, 0), size - 1)
    second = tl.minimum(tl.maximum(second, 0), size - 1)
    weight_1, weight_2 = (1.0 - fraction) * inside_1, fraction * inside_2
    return first, second, weight_1, weight_2, inside_1, inside_2


@triton.jit
def corner_offsets(
    x_0, x_1, y_0, y_1, width, stride, STEP: tl.constexpr, WIDE: tl.constexpr
):
    """Offsets of the four pixels (y, x), ``stride`` STEPs each, in 64 bits if WIDE."""
    if WIDE:
        width = width.to(tl.int64)
    y_0, y_1 = y_0 * width, y_1 * width
    return (
        (y_0 + x_0) * stride * STEP,
        (y_0 + x_1) * stride * STEP,
        (y_1 + x_0) * stride * STEP,
        (y_1 + x_1) * stride * STEP,
    )


@triton.jit
def load_corner(p_map, o_pixel, D: tl.constexpr, DP: tl.constexpr):
    """(BQ, DP) channels of one pixel for each query, in float32."""
    o_d = tl.arange(0, DP)
    p = p_map + (o_pixel[:, None] + o_d[None, :])
    if D == DP:
        b = tl.load(p)
    else:
        b = tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    return b.to(tl.float32)


@triton.jit
def load_corners(p_map, o_00, o_01, o_10, o_11, D: tl.constexpr, DP: tl.constexpr):
    return (
        load_corner(p_map, o_00, D, DP),
        load_corner(p_map, o_01, D, DP),
        load_corner(p_map, o_10, D, DP),
        load_corner(p_map, o_11, D, DP),
    )


@triton.jit
def blend(b_00, b_01, b_10, b_11, w_00, w_01, w_10, w_11):
    """(BQ, DP) sum of the corners (BQ, DP) by weights (BQ,)."""
    return (
        b_00 * w_00[:, None]
        + b_01 * w_01[:, None]
        + b_10 * w_10[:, None]
        + b_11 * w_11[:, None]
    )


@triton.jit
def head_rows(
    i_b, i_view, head0, heads_left, o_n, num_views, num_heads, num_queries,
    BR: tl.constexpr,
):  # fmt: skip
    """(BR, BQ) rows of a contiguous (B, Vq, Hq, N, ...) tensor and which exist.

    Args:
        head0, heads_left: First head of the tile and how many there are from it on.
        o_n: (BQ,) queries.
    """
    o_r = tl.arange(0, BR)
    first = (i_b * num_views + i_view) * num_heads + head0
    o_row = (first + o_r)[:, None] * num_queries + o_n[None, :]
    mask = (o_r < heads_left)[:, None] & (o_n < num_queries)[None, :]
    return o_row, mask


@triton.jit
def channel_vectors(D: tl.constexpr, DP: tl.constexpr, VEC: tl.constexpr):
    """(DP / VEC, VEC) channels and which exist.

    A tile that is loaded in this shape gives each lane VEC channels of a row, as the
    corners have it; else the compiler would give it more, and move what is sampled
    between lanes for every point.
    """
    o_d = tl.arange(0, DP // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    return o_d, o_d < D


@triton.jit
def load_heads(
    p, head0, o_n, stride_h, stride_n, mask,
    BR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(BR, BQ, DP) in float32, zero where there is no head or query."""
    o_r = (head0 + tl.arange(0, BR)).to(tl.int64)
    o_d, m_d = channel_vectors(D, DP, VEC)
    o_row = o_r[:, None] * stride_h + o_n.to(tl.int64)[None, :] * stride_n
    p += o_row[:, :, None, None] + o_d[None, None, :, :]
    mask = mask[:, :, None, None]
    if D != DP:
        mask = mask & m_d[None, None, :, :]
    b = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    return tl.reshape(b, (BR, o_n.shape[0], DP))


@triton.jit
def store_heads(
    p, x, o_row, mask, D: tl.constexpr, DP: tl.constexpr, VEC: tl.constexpr
):
    """Stores (BR, BQ, DP) into rows of D channels."""
    o_d, m_d = channel_vectors(D, DP, VEC)
    mask = mask[:, :, None, None]
    if D != DP:
        mask = mask & m_d[None, None, :, :]
    p += o_row[:, :, None, None] * D + o_d[None, None, :, :]
    x = tl.reshape(x, (x.shape[0], x.shape[1], DP // VEC, VEC))
    tl.store(p, x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def tile_of_program(num_queries, num_views, num_blocks, num_stacks, BQ: tl.constexpr):
    """(batch, query view, stack, block of heads, (BQ,) queries) of this program.

    Queries come first, then views: programs that run side by side read one map.
    """
    num_tiles = tl.cdiv(num_queries, BQ)
    i = tl.program_id(0)
    o_n = (i % num_tiles) * BQ + tl.arange(0, BQ)
    i = i // num_tiles
    i_view = i % num_views
    i = i // num_views
    i_block = i % num_blocks
    i = i // num_blocks
    return (i // num_stacks).to(tl.int64), i_view, i % num_stacks, i_block, o_n
