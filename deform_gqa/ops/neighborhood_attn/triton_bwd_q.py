"""Backward kernel of neighborhood_attn for q and rpb.

The loop is that of the forward kernel with the saved log-sum-exp in place of the
running maximum. For the kernel of the keys it leaves, side by side, that logarithm in
base 2 and delta = sum(grad_out * out).

The gradient of the bias is summed in two steps, both by tensor cores: the tiles of
(query, key) pairs by row offset, for each column of the patch and of the tile, into a
(NB, C * WC) accumulator that lives as long as a column of tiles; then this by column
offset. A program writes one (2K - 1, 2K - 1) sum, and the host adds those of all
patches: no atomics, the same bits each time. Large heads, and float32, take
several launches: for PART dimensions of dq each, and one for the bias alone.
"""

import triton
import triton.language as tl

from ..common.triton_tiles import (
    LN2,
    LOG2E,
    dot,
    dot_in_parts,
    keep_scale,
    load_columns,
    load_rows,
    row_strides,
    split_tf32,
    store_rows,
)
from .triton_windows import (
    bias_offsets,
    column_tiles,
    hide,
    keys_of_queries,
    locate_patch,
    patch_places,
    table_slab,
    walk_offsets,
    window_start,
)


@triton.jit
def pairs_by_columns(x, R: tl.constexpr, C: tl.constexpr, WC: tl.constexpr):
    """(M, BN) -> (R * WR, C * WC): pairs of rows by pairs of columns."""
    WR: tl.constexpr = x.shape[1] // WC
    x = tl.permute(tl.reshape(x, (R, C, WR, WC)), (0, 2, 1, 3))
    return tl.reshape(x, (R * WR, C * WC))


@triton.jit
def row_products(
    p_a, stride_a, stride_ad, p_b, stride_b, stride_bd, o_m, mask, head_dim,
    PART: tl.constexpr,
):  # fmt: skip
    """Sums of a * b over D, PART at a time, for some rows of two matrices in memory."""
    o_d = tl.arange(0, PART)[None, :]
    total = tl.zeros(o_m.shape, tl.float32)
    for d0 in range(0, head_dim, PART):
        m = mask[:, None] & (d0 + o_d < head_dim)
        # (M, PART)
        o = o_m[:, None] * stride_a + (d0 + o_d) * stride_ad
        b_a = tl.load(p_a + o, mask=m, other=0.0)
        o = o_m[:, None] * stride_b + (d0 + o_d) * stride_bd
        b_b = tl.load(p_b + o, mask=m, other=0.0)
        total += tl.sum(b_a.to(tl.float32) * b_b.to(tl.float32), 1)
    return total


@triton.jit
def add_by_row(chosen, x, acc):
    """acc + chosen x, of a matrix of booleans, which any precision holds exactly."""
    if x.dtype == tl.float32:
        high, low = split_tf32(x)
        chosen = chosen.to(tl.float32)
        acc = tl.dot(chosen, low, acc, input_precision='tf32')
        acc = tl.dot(chosen, high, acc, input_precision='tf32')
    else:
        acc = tl.dot(chosen.to(x.dtype), x, acc)
    return acc


@triton.jit
def add_by_column(x, chosen, acc, EXACT: tl.constexpr):
    """acc + x chosen; x is rounded to TF32 unless EXACT."""
    chosen = chosen.to(tl.float32)
    if EXACT:
        x, low = split_tf32(x)
        acc = tl.dot(low, chosen, acc, input_precision='tf32')
    return tl.dot(x, chosen, acc, input_precision='tf32')


@triton.jit
def is_row_offset(first, NB: tl.constexpr, R: tl.constexpr, WR: tl.constexpr):
    """(NB, R * WR): whether a pair of rows has an offset (index of rpb).

    ``first`` is the index of the tile's first row from the patch's first.
    """
    pair = tl.arange(0, R * WR)
    index = first + pair % WR - pair // WR
    return index[None, :] == tl.arange(0, NB)[:, None]


@triton.jit
def is_column_offset(first, NB: tl.constexpr, C: tl.constexpr, WC: tl.constexpr):
    """(C * WC, NB): as is_row_offset, for pairs of columns."""
    pair = tl.arange(0, C * WC)
    index = first + pair % WC - pair // WC
    return index[:, None] == tl.arange(0, NB)[None, :]


@triton.jit
def backward_queries(
    b_q, b_do, lse2, delta, p_q, p_do, p_k, p_v, q_n, q_d, do_n, do_d, k_n, k_d, v_n,
    v_d, p_table, i_h, o_m, m_m, start_row, start_col, o_row, row0, col0, row_begin,
    row_end, first_jx, last_jx, origin, rows, cols, width, dilation, kernel_size,
    num_places, head_dim, first_dim, q_factor, scale_log2, seed, dropout_p,
    D: tl.constexpr, DP: tl.constexpr, OUT: tl.constexpr, PART: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, WC: tl.constexpr, NB: tl.constexpr, BORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr, QUERY_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """dq (M, PART) but for the scale, and the bias gradient (NB, NB) by offset."""
    acc = tl.zeros([R * C, PART], tl.float32)
    by_offset = tl.zeros([NB, NB], tl.float32)
    o_n, row_n, col_n = walk_offsets(width, dilation, BN, WC)
    o_bias = bias_offsets(R, C, BN, WC)
    for jx in range(first_jx, last_jx):
        col = col0 - kernel_size // 2 + jx * WC
        m_col = (col + col_n >= 0) & (col + col_n < cols)
        p_slab = table_slab(
            p_table, i_h, jx, row0, kernel_size, R, C, BN, WC, BORDER, HAS_BIAS
        )
        by_row = tl.zeros([NB, C * WC], tl.float32)
        for row in range(row_begin, row_end, BN // WC):
            place = origin + (row * width.to(tl.int64) + col) * dilation
            m_n = m_col & (row + row_n < rows)
            p_k_tile, p_v_tile = p_k + place * k_n, p_v + place * v_n
            # (M, BN)
            bias = tl.load(p_slab + row * (C * WC) + o_bias)
            if PART == DP:
                # (DP, BN)
                b_k = load_columns(p_k_tile, o_n, k_n, k_d, m_n, D, DP)
                b_v = load_columns(p_v_tile, o_n, v_n, v_d, m_n, D, DP)
                logits = dot(b_q, b_k, bias)
                grad = dot(b_do, b_v)
            else:
                logits = dot_in_parts(
                    p_q, q_n, q_d, o_m, m_m, q_factor, p_k_tile, k_n, k_d,
                    o_n, m_n, bias, head_dim, PART,
                )  # fmt: skip
                grad = dot_in_parts(
                    p_do, do_n, do_d, o_m, m_m, 1.0, p_v_tile, v_n, v_d,
                    o_n, m_n, tl.zeros([R * C, BN], tl.float32), head_dim, PART,
                )  # fmt: skip
            if BORDER:
                logits = hide(
                    logits, (row + row_n)[None, :], (col + col_n)[None, :],
                    start_row[:, None], start_col[:, None], kernel_size,
                )  # fmt: skip
            weights = tl.exp2(logits * scale_log2 - lse2[:, None])
            if DROPOUT:
                o_key = (place + o_n)[None, :]
                grad *= keep_scale(seed, dropout_p, o_row[:, None], o_key, num_places)
            grad = (weights * (grad - delta[:, None])).to(b_q.dtype)
            if QUERY_GRAD:
                if PART != DP:
                    # (PART, BN)
                    p_k_tile += first_dim * k_d
                    b_k = load_columns(p_k_tile, o_n, k_n, k_d, m_n, OUT, PART)
                acc = dot(grad, tl.trans(b_k), acc)
            if BIAS_GRAD:
                chosen = is_row_offset(row - row0 + kernel_size - 1, NB, R, BN // WC)
                by_row = add_by_row(chosen, pairs_by_columns(grad, R, C, WC), by_row)
        if BIAS_GRAD:
            chosen = is_column_offset(col - col0 + kernel_size - 1, NB, C, WC)
            EXACT: tl.constexpr = b_q.dtype == tl.float32
            by_offset = add_by_column(by_row, chosen, by_offset, EXACT)
    return acc, by_offset


@triton.jit(do_not_specialize=[
    "num_heads", "heads_per_kv", "num_patches", "height", "width", "kernel_size",
    "dilation", "head_dim", "seed",
])  # fmt: skip
def neighborhood_dq_kernel(
    p_q, p_k, p_v, p_table, p_out, p_do, p_lse, p_stats, p_dq, p_drpb,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    out_b, out_h, out_n, out_d, do_b, do_h, do_n, do_d, dq_b, dq_h, dq_n,
    num_heads, heads_per_kv, num_patches, height, width, kernel_size, dilation,
    head_dim, first_dim, q_factor, scale_log2, seed, dropout_p,
    D: tl.constexpr, DP: tl.constexpr, OUT: tl.constexpr, PART: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, WC: tl.constexpr, NB: tl.constexpr,
    HAS_BIAS: tl.constexpr, QUERY_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr,
    DROPOUT: tl.constexpr, SCALE_Q: tl.constexpr,
    Q_VEC: tl.constexpr, KV_VEC: tl.constexpr,
):  # fmt: skip
    q_b, q_h, q_n = row_strides(q_b, q_h, q_n, Q_VEC)
    k_b, k_h, k_n = row_strides(k_b, k_h, k_n, KV_VEC)
    v_b, v_h, v_n = row_strides(v_b, v_h, v_n, KV_VEC)
    out_b, out_h, out_n = row_strides(out_b, out_h, out_n, Q_VEC)
    do_b, do_h, do_n = row_strides(do_b, do_h, do_n, Q_VEC)
    dq_b, dq_h, dq_n = row_strides(dq_b, dq_h, dq_n, D)
    num_places = height * width.to(tl.int64)
    i_bh = tl.program_id(0) // num_patches
    i_b, i_h = (i_bh // num_heads).to(tl.int64), (i_bh % num_heads).to(tl.int64)
    i_kv = i_h // heads_per_kv
    p_q += i_b * q_b + i_h * q_h
    p_out += i_b * out_b + i_h * out_h
    p_do += i_b * do_b + i_h * do_h
    p_dq += i_b * dq_b + i_h * dq_h + first_dim
    p_k += i_b * k_b + i_kv * k_h
    p_v += i_b * v_b + i_kv * v_h
    origin, rows, cols, row0, col0 = locate_patch(
        tl.program_id(0) % num_patches, height, width, dilation, R, C
    )
    row_m, col_m, o_m, m_m = patch_places(
        origin, rows, cols, row0, col0, width, dilation, R, C
    )
    start_row = window_start(row_m, rows, kernel_size)
    start_col = window_start(col_m, cols, kernel_size)
    row_begin, row_end, inner_y = keys_of_queries(row0, R, rows, kernel_size)
    col_begin, col_end, inner_x = keys_of_queries(col0, C, cols, kernel_size)
    inner = inner_y & inner_x
    first_jx, last_jx = column_tiles(col_begin, col_end, col0, kernel_size, WC)
    # (M, DP)
    b_q = load_rows(p_q, o_m, q_n, q_d, m_m, D, DP)
    if SCALE_Q:
        b_q = (b_q * q_factor).to(b_q.dtype)
    o_row = i_bh.to(tl.int64) * num_places + o_m
    # (M, DP)
    b_do = load_rows(p_do, o_m, do_n, do_d, m_m, D, DP)
    if PART == DP:
        b_out = load_rows(p_out, o_m, out_n, out_d, m_m, D, DP)
        delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    else:
        delta = row_products(
            p_do, do_n, do_d, p_out, out_n, out_d, o_m, m_m, head_dim, PART
        )
    # (M,) log2 of the softmax's denominator; infinite where there is no query
    lse2 = tl.load(p_lse + o_row, mask=m_m, other=float('inf')) * LOG2E
    if QUERY_GRAD:
        o_stats = o_row[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(p_stats + o_stats, tl.join(lse2, delta), mask=m_m[:, None])
    if inner:
        acc, by_offset = backward_queries(
            b_q, b_do, lse2, delta, p_q, p_do, p_k, p_v, q_n, q_d, do_n, do_d, k_n, k_d,
            v_n, v_d, p_table, i_h, o_m, m_m, start_row, start_col, o_row, row0, col0,
            row_begin, row_end, 0, 1, origin, rows, cols, width, dilation,
            kernel_size, num_places, head_dim, first_dim, q_factor, scale_log2, seed,
            dropout_p, D, DP, OUT, PART, R, C, BN, WC, NB, False, HAS_BIAS,
            QUERY_GRAD, BIAS_GRAD, DROPOUT,
        )  # fmt: skip
    else:
        acc, by_offset = backward_queries(
            b_q, b_do, lse2, delta, p_q, p_do, p_k, p_v, q_n, q_d, do_n, do_d, k_n, k_d,
            v_n, v_d, p_table, i_h, o_m, m_m, start_row, start_col, o_row, row0, col0,
            row_begin, row_end, first_jx, last_jx, origin, rows, cols, width, dilation,
            kernel_size, num_places, head_dim, first_dim, q_factor, scale_log2, seed,
            dropout_p, D, DP, OUT, PART, R, C, BN, WC, NB, True, HAS_BIAS,
            QUERY_GRAD, BIAS_GRAD, DROPOUT,
        )  # fmt: skip

    if QUERY_GRAD:
        acc *= scale_log2 * q_factor * LN2
        store_rows(p_dq, acc, o_m, dq_n, m_m, OUT, PART)
    if BIAS_GRAD:
        side = 2 * kernel_size - 1
        o_y, o_x = tl.arange(0, NB)[:, None], tl.arange(0, NB)[None, :]
        # (programs, 2K - 1, 2K - 1)
        p_drpb += tl.program_id(0).to(tl.int64) * (side * side)
        m_offset = (o_y < side) & (o_x < side)
        tl.store(p_drpb + o_y * side + o_x, by_offset, mask=m_offset)
