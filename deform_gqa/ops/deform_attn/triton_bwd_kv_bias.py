"""Backward kernel of deform_attn for k, v, pos and the table in one launch.

The mathematics and the notation are those of ``triton_bwd_kv.py``, which computes the
same where the registers do not suffice for this form. Here the queries of a patch are
dealt out to the NB = num_warps warps, and each warp computes transposed, its M / NB
queries against all BN keys, as one matrix of a batched product::

    S^T = K Q^T     P^T = exp2(S^T)     dV += P^T dO     dK += dS^T Q

So P^T and dS^T stay in the registers of the warp that made them, as left operands of
the products with dO and Q; untransposed they would travel through shared memory, once
for every warp that reads them, which bound the kernel. Each warp has its own sum of dk
and dv, and they are added once, at the end.

Patches are walked down the columns of the map: what sums over columns depends on the
keys and on the patch's first column alone, and is kept in registers as an operand.
"""

import triton
import triton.language as tl

from ..common.triton_tiles import LN2, LOG2E, dot, load_rows, row_strides, store_rows
from .triton_bias import (
    load_table_rows,
    load_taps,
    patch_bias,
    query_rows,
    row_taps,
)
from .triton_key_taps import key_order
from .triton_pack_table import PADDING_ROWS, table_of_head


@triton.jit
def queries_by_warp(
    row0, col0, height, width, R: tl.constexpr, C: tl.constexpr, NB: tl.constexpr
):
    """(NB, M / NB) queries of a patch, column by column, and which are on the map.

    The others stand for a query on its rim, so that no load needs a mask.
    """
    SHARE: tl.constexpr = R * C // NB
    m = tl.arange(0, NB)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    row, col = row0 + m % R, col0 + m // R
    o_m = tl.minimum(row, height - 1) * width + tl.minimum(col, width - 1)
    return o_m, (row < height) & (col < width)


@triton.jit
def load_by_warp(p, o_row, stride_row, stride_d, D: tl.constexpr, DP: tl.constexpr):
    """(NB, M / NB, DP) rows of a matrix, zero outside."""
    o_d = tl.arange(0, DP)
    o_row = o_row.to(tl.int64) * stride_row
    p = p + o_row[:, :, None] + o_d.to(tl.int64)[None, None, :] * stride_d
    if D == DP:
        x = tl.load(p)
    else:
        x = tl.load(p, mask=(o_d < D)[None, None, :], other=0.0)
    return x


@triton.jit
def keys_by_warp(x, NB: tl.constexpr, NW: tl.constexpr):
    """(BN, C, R), keys in the order of key_order -> (NB, BN, M / NB), keys in order."""
    BN: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1] * x.shape[2]
    x = tl.permute(tl.reshape(x, (BN // NW, NW, NB, M // NB)), (2, 1, 0, 3))
    return tl.reshape(x, (NB, BN, M // NB))


@triton.jit
def keys_by_patch(x, NW: tl.constexpr, C: tl.constexpr):
    """The inverse of ``keys_by_warp``."""
    NB: tl.constexpr = x.shape[0]
    BN: tl.constexpr = x.shape[1]
    SHARE: tl.constexpr = x.shape[2]
    x = tl.permute(tl.reshape(x, (NB, NW, BN // NW, SHARE)), (2, 1, 0, 3))
    return tl.reshape(x, (BN, C, NB * SHARE // C))


@triton.jit
def weights_and_indicators(distance, moves, DTYPE: tl.constexpr, PEAK: tl.constexpr):
    """(BN, 2 * COUNT, n): tent weights of cells, and 1 at the cell that t lies in.

    Args:
        distance: (BN, COUNT, n), of t from each cell.
        moves: Whether t moves with the position; else it has no cell.
        PEAK: Power of two that all is multiplied by.
    """
    BN: tl.constexpr = distance.shape[0]
    COUNT: tl.constexpr = distance.shape[1]
    weights = tl.maximum(PEAK - tl.abs(distance) * PEAK, 0.0)
    is_cell = tl.where((distance >= 0.0) & (distance < 1.0) & moves, PEAK, 0.0)
    x = tl.join(weights.to(DTYPE), is_cell.to(DTYPE))
    return tl.reshape(tl.permute(x, (0, 3, 1, 2)), (BN, 2 * COUNT, distance.shape[2]))


@triton.jit
def column_contraction(
    b_u, step, C: tl.constexpr, CW: tl.constexpr, DTYPE: tl.constexpr
):
    """(BN, 2 * CW, C), the left operand that sums over columns into table columns.

    It takes means, as sums that become float16 again could overflow.
    """
    PEAK: tl.constexpr = 1.0 / C
    shift = (
        tl.arange(0, C).to(tl.float32)[None, :] * step
        - tl.arange(0, CW).to(tl.float32)[:, None]
    )
    distance = b_u[:, None, None] + shift[None, :, :]
    return weights_and_indicators(distance, True, DTYPE, PEAK)


@triton.jit
def row_contraction(
    b_ty, row0, height, table_h, step_y,
    R: tl.constexpr, RW: tl.constexpr, IN_RANGE: tl.constexpr, DTYPE: tl.constexpr,
    PEAK: tl.constexpr,
):  # fmt: skip
    """The table row that the patch's first row lies in, (BN,), and what sums over rows.

    That is (BN, 2 * RW, R), of RW table rows from this one on.
    """
    first, _, _ = row_taps(b_ty + row0 * step_y, table_h, IN_RANGE)
    t = b_ty[:, None] + query_rows(row0, height, 1, R)[None, :] * step_y
    if IN_RANGE:
        moves = True
    else:
        moves = ((t > -1.0) & (t < table_h))[:, None, :]
        t = tl.minimum(tl.maximum(t, -1.0), table_h)
    t -= first.to(tl.float32)[:, None]
    distance = t[:, None, :] - tl.arange(0, RW).to(tl.float32)[None, :, None]
    return first, weights_and_indicators(distance, moves, DTYPE, PEAK)


@triton.jit
def window_corner(start, table_h, row_pitch):
    """Block of the packed table at the top of the column ``start``, counted from -1."""
    return ((start & 3) * (table_h + PADDING_ROWS) + 1) * row_pitch + (start >> 2)


@triton.jit
def load_cell_rows(p_table, b_corner, o_row, CW: tl.constexpr):
    """Two (BN, n, CW / 4, 4): the table in rows ``o_row`` and in the ones below."""
    x = load_table_rows(p_table, b_corner, o_row, CW)
    x = tl.reshape(x, (x.shape[0], x.shape[1], CW // 4, 2, 4)).to(tl.float32)
    return tl.split(tl.permute(x, (0, 1, 2, 4, 3)))


@triton.jit
def add_window(
    p_dtable, x, first, start, cols, unit,
    RW: tl.constexpr, CW: tl.constexpr, IN_RANGE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Atomic add of the windows (BN, RW, CW), but for zeros; see ``add_to_table``.

    Row and column 0 stand for -1. What is not zero lies in cells next to a t, so in
    rows and, of positions in range, in columns of the table or the padding.
    """
    o_row = (first + 1)[:, None, None] + tl.arange(0, RW)[None, :, None]
    o_col = start[:, None, None] + tl.arange(0, CW)[None, None, :]
    mask = x != 0.0
    if not IN_RANGE:
        mask = mask & (o_col < cols)
    p = p_dtable + (o_row * cols + o_col)
    if FIXED:
        tl.atomic_add(p, (x * unit).to(tl.int64), mask=mask, sem='relaxed')
    else:
        tl.atomic_add(p, x, mask=mask, sem='relaxed')


@triton.jit
def add_bias_gradient(
    sums, p_taps, p_table, p_dtable, row0, col0, height, table_h, table_w, row_pitch,
    step_y, step_x, unit,
    CW: tl.constexpr, RW: tl.constexpr, NW: tl.constexpr, PEAK: tl.constexpr,
    IN_RANGE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Sums (BN, 2 * CW, R) over rows into table rows and adds them to the table's.

    PEAK is the inverse of the factor that the sums over columns have.

    Returns:
        Summands of the gradients of t_y and t_x, (BN, RW, CW / 4).
    """
    BN: tl.constexpr = sums.shape[0]
    # Loaded again, as registers are scarce.
    b_ty, _, start, _ = load_taps(
        p_taps, col0, step_x, table_h, table_w, row_pitch, BN, NW
    )
    first, by_rows = row_contraction(
        b_ty, row0, height, table_h, step_y, sums.shape[2], RW, IN_RANGE, sums.dtype,
        PEAK,
    )  # fmt: skip
    x = dot(sums, tl.permute(by_rows, (0, 2, 1)))
    x = tl.permute(tl.reshape(x, (BN, 2, CW, 2, RW)), (0, 4, 2, 3, 1))
    by_weight, by_cell = tl.split(x)
    grad, grad_y = tl.split(by_weight)
    grad_x, _ = tl.split(by_cell)
    add_window(p_dtable, grad, first, start, table_w + 4, unit, RW, CW, IN_RANGE, FIXED)
    # No gradient reaches rows below the table.
    row = first[:, None] + tl.arange(0, RW)[None, :]
    row = tl.minimum(row, table_h) * row_pitch
    b_corner = window_corner(start, table_h, row_pitch)
    cells, below = load_cell_rows(p_table, b_corner, row, CW)
    b_corner = window_corner(start + 1, table_h, row_pitch)
    right, _ = load_cell_rows(p_table, b_corner, row, CW)
    grad_y = tl.reshape(grad_y, (BN, RW, CW // 4, 4)) * (below - cells)
    grad_x = tl.reshape(grad_x, (BN, RW, CW // 4, 4)) * (right - cells)
    return tl.sum(grad_y, 3), tl.sum(grad_x, 3)


@triton.jit(do_not_specialize=[
    "num_heads", "heads_per_kv", "heads_per_group", "num_keys", "head_dim", "height",
    "width", "table_h", "table_w", "row_pitch", "seed", "num_splits", "num_copies",
])  # fmt: skip
def deform_attn_dkdv_dbias_kernel(
    p_q, p_k, p_v, p_taps, p_table, p_do, p_lse, p_delta,
    p_dk, p_dv, p_dpos, p_dtable, p_unit,
    q_b, q_h, q_n, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    do_b, do_h, do_n, do_d,
    num_heads, heads_per_kv, heads_per_group, num_keys, head_dim, height, width,
    table_h, table_w, row_pitch,
    step_y, step_x, slope_y, slope_x, q_factor, scale_log2, seed, dropout_p,
    num_splits, num_copies,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, CW: tl.constexpr, RW: tl.constexpr, NW: tl.constexpr,
    HAS_BIAS: tl.constexpr, IN_RANGE: tl.constexpr, DROPOUT: tl.constexpr,
    SCALE_Q: tl.constexpr, PART: tl.constexpr, FIXED: tl.constexpr,
    KEY_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr,
    Q_VEC: tl.constexpr, KV_VEC: tl.constexpr,
):  # fmt: skip
    q_b, q_h, q_n = row_strides(q_b, q_h, q_n, Q_VEC)
    k_b, k_h, k_s = row_strides(k_b, k_h, k_s, KV_VEC)
    v_b, v_h, v_s = row_strides(v_b, v_h, v_s, KV_VEC)
    do_b, do_h, do_n = row_strides(do_b, do_h, do_n, Q_VEC)
    # Warps, of which a tile has no more than keys.
    NB: tl.constexpr = NW
    M: tl.constexpr = R * C
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    scale = scale_log2 * LN2
    num_tiles = tl.cdiv(num_keys, BN)
    i_tile = tl.program_id(0) % num_tiles
    i_split = (tl.program_id(0) // num_tiles) % num_splits
    i_bkv = tl.program_id(0) // (num_tiles * num_splits)
    num_kv = num_heads // heads_per_kv
    i_b, i_kv = (i_bkv // num_kv).to(tl.int64), (i_bkv % num_kv).to(tl.int64)
    num_bkv = tl.num_programs(0) // (num_tiles * num_splits)

    p_k += i_b * k_b + i_kv * k_h
    p_v += i_b * v_b + i_kv * v_h
    o_s = (i_tile * BN + tl.arange(0, BN)).to(tl.int64)
    m_s = o_s < num_keys
    # (NB, BN, DP), the same for each warp
    b_k = load_rows(p_k, o_s, k_s, k_d, m_s, D, DP)
    b_k = tl.broadcast_to(b_k[None, :, :], (NB, BN, DP))
    b_v = load_rows(p_v, o_s, v_s, v_d, m_s, D, DP)
    b_v = tl.broadcast_to(b_v[None, :, :], (NB, BN, DP))
    grad_k = tl.zeros([NB, BN, DP], tl.float32)
    grad_v = tl.zeros([NB, BN, DP], tl.float32)

    # Patches column by column
    per_column = tl.cdiv(height, R)
    num_patches = per_column * tl.cdiv(width, C)
    per_split = tl.cdiv(num_patches, num_splits)
    first_patch = i_split * per_split
    last_patch = tl.minimum(first_patch + per_split, num_patches)
    if FIXED:
        unit = tl.load(p_unit)
    else:
        unit = 1.0

    for i_in_kv in range(0, heads_per_kv):
        i_h = i_kv * heads_per_kv + i_in_kv
        o_bh = (i_b * num_heads + i_h) * height * width
        i_bg = i_b * (num_heads // heads_per_group) + i_h // heads_per_group
        p_taps_h = p_taps + (i_bg * num_tiles + i_tile) * (2 * BN)
        p_table_h = table_of_head(p_table, i_h, table_h, row_pitch)
        i_copy = tl.program_id(0) % num_copies
        p_dtable_h = p_dtable
        p_dtable_h += (i_copy * num_heads + i_h) * (table_h + 4) * (table_w + 4)
        p_q_h = p_q + i_b * q_b + i_h * q_h
        p_do_h = p_do + i_b * do_b + i_h * do_h
        # Summed over the other dimensions after the loop.
        grad_y = tl.zeros([BN, RW, CW // 4], tl.float32)
        grad_x = tl.zeros([BN, RW, CW // 4], tl.float32)
        for i_col in range(first_patch // per_column, tl.cdiv(last_patch, per_column)):
            col0 = i_col * C
            _, _, _, b_u = load_taps(
                p_taps_h, col0, step_x, table_h, table_w, row_pitch, BN, NW
            )
            by_columns = column_contraction(b_u, step_x, C, CW, DTYPE)
            first_row = tl.maximum(first_patch - i_col * per_column, 0)
            last_row = tl.minimum(last_patch - i_col * per_column, per_column)
            for i_row in range(first_row, last_row):
                row0 = i_row * R
                o_m, m_m = queries_by_warp(row0, col0, height, width, R, C, NB)
                bias = patch_bias(
                    p_table_h, p_taps_h, row0, col0, height, table_h, table_w,
                    row_pitch, step_y, step_x, 1, R, C, BN, CW, NW, IN_RANGE,
                )  # fmt: skip
                # (NB, BN, M / NB)
                bias = keys_by_warp(bias, NB, NW).to(tl.float32)
                # (NB, M / NB, DP)
                b_q = load_by_warp(p_q_h, o_m, q_n, q_d, D, DP)
                if SCALE_Q:
                    b_q = (b_q * q_factor).to(b_q.dtype)
                logits = dot(b_k, tl.permute(b_q, (0, 2, 1)), bias)
                # (NB, M / NB)
                lse2 = tl.load(p_lse + o_bh + o_m)
                lse2 = tl.where(m_m, lse2 * LOG2E, float('inf'))[:, None, :]
                # As in triton_bwd_kv.py, 1 at most is as good as masking absent keys.
                exponent = logits * scale_log2 - lse2
                weights = tl.exp2(tl.minimum(exponent, 0.0, tl.PropagateNan.ALL))
                delta = tl.load(p_delta + o_bh + o_m)
                delta = delta[:, None, :]
                b_do = load_by_warp(p_do_h, o_m, do_n, do_d, D, DP)
                grad = tl.broadcast_to(-delta, (NB, BN, M // NB))
                grad = dot(b_v, tl.permute(b_do, (0, 2, 1)), grad)
                grad_v = dot(weights.to(DTYPE), b_do, grad_v)
                grad = (weights * grad).to(DTYPE)
                grad_k = dot(grad, b_q, grad_k)
                # (BN, 2 * CW, R)
                sums = dot(by_columns, keys_by_patch(grad, NW, C))
                for_y, for_x = add_bias_gradient(
                    sums.to(DTYPE), p_taps_h, p_table_h, p_dtable_h, row0, col0, height,
                    table_h, table_w, row_pitch, step_y, step_x, unit,
                    CW, RW, NW, 1.0 * C, IN_RANGE, FIXED,
                )  # fmt: skip
                grad_y += for_y
                grad_x += for_x
        o_tap = i_tile * BN + key_order(BN, NW)
        m_tap = o_tap < num_keys
        # (splits, B, Hq, S, 2)
        o_dpos = (i_split * (num_bkv // num_kv) + i_b) * num_heads + i_h
        p_dpos_h = p_dpos + (o_dpos * num_keys + o_tap) * 2
        grad_y = tl.sum(tl.sum(grad_y, 2), 1) * slope_y
        grad_x = tl.sum(tl.sum(grad_x, 2), 1) * slope_x
        tl.store(p_dpos_h, grad_y, mask=m_tap)
        tl.store(p_dpos_h + 1, grad_x, mask=m_tap)

    # (splits, B, Hkv, S, D)
    o_row = (i_split.to(tl.int64) * num_bkv + i_bkv) * num_keys + o_s
    store_rows(p_dk, tl.sum(grad_k, 0) * scale, o_row, D, m_s, D, DP)
    store_rows(p_dv, tl.sum(grad_v, 0), o_row, D, m_s, D, DP)
