"""Backward kernel of neighborhood_attn for k and v.

One program keeps a patch of R x C keys of a kv head and walks over the query heads of
that head and the queries whose windows hold any of these keys, so that dk and dv are
sums in registers over the whole group: no atomics. It computes transposed, keys by
queries, which makes its loop the mirror image of the forward kernel's: the weights are
the left operands of the products that add to dk and dv.

Where there are few patches, the heads of a group are split over ``num_splits``
programs, whose partial results the host adds. Of large heads a launch computes PART
dimensions of dk and dv.
"""

import triton
import triton.language as tl

from ..common.triton_tiles import (
    LN2,
    dot,
    dot_in_parts,
    keep_scale,
    load_rows,
    row_strides,
    store_rows,
)
from .triton_windows import (
    bias_offsets,
    column_tiles,
    hide,
    locate_patch,
    patch_places,
    queries_of_keys,
    table_slab,
    walk_offsets,
    window_start,
)


@triton.jit
def load_stats(p_stats, o_n, m_n):
    """(BN,) log2 of the softmax's denominator, infinite off the map, and delta.

    By one load of pairs, which are as many as threads: Triton spreads it over them,
    and gives each thread the queries that it needs by shared memory. Of two smaller
    loads it would have each thread load all of its queries.
    """
    which = tl.arange(0, 2)[None, :]
    absent = tl.where(which == 0, float('inf'), 0.0)
    # (BN, 2)
    stats = tl.load(p_stats + o_n[:, None] * 2 + which, mask=m_n[:, None], other=absent)
    return tl.split(stats)


@triton.jit
def add_heads(
    b_k, b_v, grad_k, grad_v, p_k, p_v, k_n, k_d, v_n, v_d, m_m, p_q, p_do, p_stats,
    p_table, first_head, last_head, q_h, q_n, q_d, do_h, do_n, do_d, row_m, col_m, o_m,
    row0, col0, row_begin, row_end, first_jx, last_jx, origin, rows, cols, width,
    dilation, kernel_size, o_b, num_places, head_dim, first_dim, q_factor, scale_log2,
    seed, dropout_p,
    D: tl.constexpr, DP: tl.constexpr, OUT: tl.constexpr, PART: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, WC: tl.constexpr,
    BORDER: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    SCALE_Q: tl.constexpr,
):  # fmt: skip
    """Adds query heads [first_head, last_head) to dk and dv."""
    o_n, row_n, col_n = walk_offsets(width, dilation, BN, WC)
    o_bias = bias_offsets(R, C, BN, WC)
    for i_h in range(first_head, last_head):
        o_bh = o_b + i_h * num_places
        for jx in range(first_jx, last_jx):
            col = col0 - kernel_size // 2 + jx * WC
            m_col = (col + col_n >= 0) & (col + col_n < cols)
            start_col = window_start(col + col_n, cols, kernel_size)
            p_slab = table_slab(
                p_table, i_h, jx, row0, kernel_size, R, C, BN, WC, BORDER, HAS_BIAS
            )
            for row in range(row_begin, row_end, BN // WC):
                place = origin + (row * width.to(tl.int64) + col) * dilation
                m_n = m_col & (row + row_n < rows)
                lse2, delta = load_stats(p_stats + (o_bh + place) * 2, o_n, m_n)
                p_q_tile = p_q + (i_h * q_h + place * q_n)
                p_do_tile = p_do + (i_h * do_h + place * do_n)
                # (M, BN): keys by queries
                bias = tl.load(p_slab + row * (C * WC) + o_bias)
                if PART != DP:
                    logits = dot_in_parts(
                        p_k, k_n, k_d, o_m, m_m, q_factor, p_q_tile, q_n, q_d,
                        o_n, m_n, bias, head_dim, PART,
                    )  # fmt: skip
                    grad = dot_in_parts(
                        p_v, v_n, v_d, o_m, m_m, 1.0, p_do_tile, do_n, do_d,
                        o_n, m_n, tl.zeros([R * C, BN], tl.float32), head_dim, PART,
                    )  # fmt: skip
                    p_q_tile += first_dim * q_d
                    p_do_tile += first_dim * do_d
                # (BN, PART)
                b_q = load_rows(p_q_tile, o_n, q_n, q_d, m_n, OUT, PART)
                if SCALE_Q:
                    b_q = (b_q * q_factor).to(b_q.dtype)
                b_do = load_rows(p_do_tile, o_n, do_n, do_d, m_n, OUT, PART)
                if PART == DP:
                    logits = dot(b_k, tl.trans(b_q), bias)
                    grad = dot(b_v, tl.trans(b_do))
                if BORDER:
                    start_row = window_start(row + row_n, rows, kernel_size)
                    logits = hide(
                        logits, row_m[:, None], col_m[:, None],
                        start_row[None, :], start_col[None, :], kernel_size,
                    )  # fmt: skip
                weights = tl.exp2(logits * scale_log2 - lse2[None, :])
                dropped = weights
                if DROPOUT:
                    o_row = (o_bh + place + o_n)[None, :]
                    keep = keep_scale(seed, dropout_p, o_row, o_m[:, None], num_places)
                    grad *= keep
                    dropped *= keep
                grad_v = dot(dropped.to(b_do.dtype), b_do, grad_v)
                grad = (weights * (grad - delta[None, :])).to(b_q.dtype)
                grad_k = dot(grad, b_q, grad_k)
    return grad_k, grad_v


@triton.jit(do_not_specialize=[
    "num_heads", "heads_per_kv", "num_patches", "height", "width", "kernel_size",
    "dilation", "head_dim", "seed", "num_splits",
])  # fmt: skip
def neighborhood_dkdv_kernel(
    p_q, p_k, p_v, p_table, p_do, p_stats, p_dk, p_dv,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    do_b, do_h, do_n, do_d,
    num_heads, heads_per_kv, num_patches, height, width, kernel_size, dilation,
    head_dim, first_dim, q_factor, scale_log2, seed, dropout_p, num_splits,
    D: tl.constexpr, DP: tl.constexpr, OUT: tl.constexpr, PART: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, WC: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SCALE_Q: tl.constexpr,
    Q_VEC: tl.constexpr, KV_VEC: tl.constexpr,
):  # fmt: skip
    q_b, q_h, q_n = row_strides(q_b, q_h, q_n, Q_VEC)
    k_b, k_h, k_n = row_strides(k_b, k_h, k_n, KV_VEC)
    v_b, v_h, v_n = row_strides(v_b, v_h, v_n, KV_VEC)
    do_b, do_h, do_n = row_strides(do_b, do_h, do_n, Q_VEC)
    num_places = height * width.to(tl.int64)
    num_kv = num_heads // heads_per_kv
    i_split = (tl.program_id(0) // num_patches) % num_splits
    i_bkv = tl.program_id(0) // (num_patches * num_splits)
    num_bkv = tl.num_programs(0) // (num_patches * num_splits)
    i_b, i_kv = (i_bkv // num_kv).to(tl.int64), (i_bkv % num_kv).to(tl.int64)
    p_k += i_b * k_b + i_kv * k_h
    p_v += i_b * v_b + i_kv * v_h
    origin, rows, cols, row0, col0 = locate_patch(
        tl.program_id(0) % num_patches, height, width, dilation, R, C
    )
    row_m, col_m, o_m, m_m = patch_places(
        origin, rows, cols, row0, col0, width, dilation, R, C
    )
    row_begin, row_end, inner_y = queries_of_keys(row0, R, rows, kernel_size)
    col_begin, col_end, inner_x = queries_of_keys(col0, C, cols, kernel_size)
    inner = inner_y & inner_x
    first_jx, last_jx = column_tiles(col_begin, col_end, col0, kernel_size, WC)
    # (M, DP)
    b_k = load_rows(p_k, o_m, k_n, k_d, m_m, D, DP)
    b_v = load_rows(p_v, o_m, v_n, v_d, m_m, D, DP)
    grad_k = tl.zeros([R * C, PART], tl.float32)
    grad_v = tl.zeros([R * C, PART], tl.float32)

    per_split = tl.cdiv(heads_per_kv, num_splits)
    first_head = i_kv * heads_per_kv + i_split * per_split
    last_head = tl.minimum(first_head + per_split, (i_kv + 1) * heads_per_kv)
    o_b = i_b * num_heads * num_places
    p_q += i_b * q_b
    p_do += i_b * do_b
    if inner:
        grad_k, grad_v = add_heads(
            b_k, b_v, grad_k, grad_v, p_k, p_v, k_n, k_d, v_n, v_d, m_m, p_q, p_do,
            p_stats, p_table, first_head, last_head, q_h, q_n, q_d, do_h, do_n, do_d,
            row_m, col_m, o_m, row0, col0, row_begin, row_end, 0, 1,
            origin, rows, cols, width, dilation, kernel_size, o_b, num_places, head_dim,
            first_dim, q_factor, scale_log2, seed, dropout_p,
            D, DP, OUT, PART, R, C, BN, WC, False, HAS_BIAS, DROPOUT, SCALE_Q,
        )  # fmt: skip
    else:
        grad_k, grad_v = add_heads(
            b_k, b_v, grad_k, grad_v, p_k, p_v, k_n, k_d, v_n, v_d, m_m, p_q, p_do,
            p_stats, p_table, first_head, last_head, q_h, q_n, q_d, do_h, do_n, do_d,
            row_m, col_m, o_m, row0, col0, row_begin, row_end, first_jx, last_jx,
            origin, rows, cols, width, dilation, kernel_size, o_b, num_places, head_dim,
            first_dim, q_factor, scale_log2, seed, dropout_p,
            D, DP, OUT, PART, R, C, BN, WC, True, HAS_BIAS, DROPOUT, SCALE_Q,
        )  # fmt: skip

    # (splits, B, Hkv, N, D)
    o_row = (i_split.to(tl.int64) * num_bkv + i_bkv) * num_places + o_m
    grad_k *= scale_log2 * LN2
    store_rows(p_dk + first_dim, grad_k, o_row, D, m_m, OUT, PART)
    store_rows(p_dv + first_dim, grad_v, o_row, D, m_m, OUT, PART)
