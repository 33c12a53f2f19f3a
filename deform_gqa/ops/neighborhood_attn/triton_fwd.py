"""Forward kernel of neighborhood_attn: online softmax over the windows of a patch.

One program works on a patch of R x C queries of one head (and of one phase of the
dilation) and walks over the rectangle of keys in their windows by dense tiles of WR
rows and WC columns. What the windows hold, and the bias, are added by starting the
accumulator of q k^T from the table of ``triton_table.py``; see
``triton_windows.py`` for the notation. Of large heads a launch computes PART
output dimensions, beginning with first_dim, and the logits by parts of that size. A
NaN or an infinity in k or v reaches all queries of the patches that see it.
"""

import triton
import triton.language as tl

from ..common.triton_tiles import (
    LN2,
    dot,
    dot_in_parts,
    keep_scale,
    load_columns,
    load_rows,
    row_strides,
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
def attend(
    b_q, p_q, p_k, p_v, q_n, q_d, k_n, k_d, v_n, v_d, p_table, i_h, o_m, m_m, start_row,
    start_col, o_row, row0, col0, row_begin, row_end, first_jx, last_jx, origin, rows,
    cols, width, dilation, kernel_size, num_places, head_dim, q_factor, scale_log2,
    seed, dropout_p,
    D: tl.constexpr, DP: tl.constexpr, OUT: tl.constexpr, PART: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, WC: tl.constexpr,
    BORDER: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Online softmax over all tiles of a patch: largest logit, sum, output so far."""
    peak = tl.full([R * C], -1e30, tl.float32)
    total = tl.zeros([R * C], tl.float32)
    acc = tl.zeros([R * C, PART], tl.float32)
    o_n, row_n, col_n = walk_offsets(width, dilation, BN, WC)
    o_bias = bias_offsets(R, C, BN, WC)
    for jx in range(first_jx, last_jx):
        col = col0 - kernel_size // 2 + jx * WC
        m_col = (col + col_n >= 0) & (col + col_n < cols)
        p_slab = table_slab(
            p_table, i_h, jx, row0, kernel_size, R, C, BN, WC, BORDER, HAS_BIAS
        )
        for row in range(row_begin, row_end, BN // WC):
            place = origin + (row * width.to(tl.int64) + col) * dilation
            m_n = m_col & (row + row_n < rows)
            # (M, BN)
            bias = tl.load(p_slab + row * (C * WC) + o_bias)
            if PART == DP:
                # (DP, BN)
                b_k = load_columns(p_k + place * k_n, o_n, k_n, k_d, m_n, D, DP)
                logits = dot(b_q, b_k, bias)
            else:
                logits = dot_in_parts(
                    p_q, q_n, q_d, o_m, m_m, q_factor, p_k + place * k_n, k_n, k_d,
                    o_n, m_n, bias, head_dim, PART,
                )  # fmt: skip
            if BORDER:
                logits = hide(
                    logits, (row + row_n)[None, :], (col + col_n)[None, :],
                    start_row[:, None], start_col[:, None], kernel_size,
                )  # fmt: skip
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            weights = tl.exp2(logits * scale_log2 - (new_peak * scale_log2)[:, None])
            decay = tl.exp2((peak - new_peak) * scale_log2)
            total = total * decay + tl.sum(weights, 1)
            if DROPOUT:
                o_key = (place + o_n)[None, :]
                keep = keep_scale(seed, dropout_p, o_row[:, None], o_key, num_places)
                weights *= keep
            # (BN, PART)
            b_v = load_rows(p_v + place * v_n, o_n, v_n, v_d, m_n, OUT, PART)
            acc = dot(weights.to(b_v.dtype), b_v, acc * decay[:, None])
            peak = new_peak
    return peak, total, acc


@triton.jit(do_not_specialize=[
    "num_heads", "heads_per_kv", "num_patches", "height", "width", "kernel_size",
    "dilation", "head_dim", "seed",
])  # fmt: skip
def neighborhood_fwd_kernel(
    p_q, p_k, p_v, p_table, p_out, p_lse,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    out_b, out_h, out_n,
    num_heads, heads_per_kv, num_patches, height, width, kernel_size, dilation,
    head_dim, first_dim, q_factor, scale_log2, seed, dropout_p,
    D: tl.constexpr, DP: tl.constexpr, OUT: tl.constexpr, PART: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, WC: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SCALE_Q: tl.constexpr,
    Q_VEC: tl.constexpr, KV_VEC: tl.constexpr,
):  # fmt: skip
    q_b, q_h, q_n = row_strides(q_b, q_h, q_n, Q_VEC)
    k_b, k_h, k_n = row_strides(k_b, k_h, k_n, KV_VEC)
    v_b, v_h, v_n = row_strides(v_b, v_h, v_n, KV_VEC)
    out_b, out_h, out_n = row_strides(out_b, out_h, out_n, D)
    num_places = height * width.to(tl.int64)
    i_bh = tl.program_id(0) // num_patches
    i_b, i_h = (i_bh // num_heads).to(tl.int64), (i_bh % num_heads).to(tl.int64)
    i_kv = i_h // heads_per_kv
    p_q += i_b * q_b + i_h * q_h
    p_k += i_b * k_b + i_kv * k_h
    p_v += i_b * v_b + i_kv * v_h + first_dim * v_d
    p_out += i_b * out_b + i_h * out_h + first_dim
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
    if inner:
        peak, total, acc = attend(
            b_q, p_q, p_k, p_v, q_n, q_d, k_n, k_d, v_n, v_d, p_table, i_h, o_m, m_m,
            start_row, start_col, o_row, row0, col0, row_begin, row_end, 0, 1,
            origin, rows, cols, width, dilation, kernel_size, num_places, head_dim,
            q_factor, scale_log2, seed, dropout_p,
            D, DP, OUT, PART, R, C, BN, WC, False, HAS_BIAS, DROPOUT,
        )  # fmt: skip
    else:
        peak, total, acc = attend(
            b_q, p_q, p_k, p_v, q_n, q_d, k_n, k_d, v_n, v_d, p_table, i_h, o_m, m_m,
            start_row, start_col, o_row, row0, col0, row_begin, row_end,
            first_jx, last_jx, origin, rows, cols, width, dilation, kernel_size,
            num_places, head_dim, q_factor, scale_log2, seed, dropout_p,
            D, DP, OUT, PART, R, C, BN, WC, True, HAS_BIAS, DROPOUT,
        )  # fmt: skip

    total = tl.where(m_m, total, 1.0)  # off the map there may be no keys
    acc = acc / total[:, None]
    store_rows(p_out, acc, o_m, out_n, m_m, OUT, PART)
    # (peak * scale_log2 + log2(total)) * ln(2)
    lse = (peak * scale_log2 + tl.log2(total)) * LN2
    tl.store(p_lse + o_row, lse, mask=m_m)
