"""Backward kernel of deform_attn for q: recomputes the weights a patch at a time.

The loop is that of the forward kernel with the saved log-sum-exp in place of the
running maximum. It also leaves delta = sum(grad_out * out), which the kernel for the
keys needs.
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
    patch_queries,
    query_offsets,
    row_strides,
    store_rows,
)
from .triton_bias import as_patch, patch_bias
from .triton_fwd import mask_last_tile
from .triton_pack_table import table_of_head


@triton.jit(do_not_specialize=[
    "num_heads", "heads_per_kv", "heads_per_group", "num_keys", "head_dim", "height",
    "width", "table_h", "table_w", "row_pitch", "seed",
])  # fmt: skip
def deform_attn_dq_kernel(
    p_q, p_k, p_v, p_taps, p_table, p_out, p_do, p_lse, p_delta, p_dq,
    q_b, q_h, q_n, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    do_b, do_h, do_n, do_d, out_b, out_h, out_n, out_d, dq_b, dq_h, dq_n,
    num_heads, heads_per_kv, heads_per_group, num_keys, head_dim, height, width,
    table_h, table_w, row_pitch,
    step_y, step_x, q_factor, scale_log2, seed, dropout_p,
    D: tl.constexpr, DP: tl.constexpr,
    HS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, CW: tl.constexpr, NW: tl.constexpr,
    HAS_BIAS: tl.constexpr, IN_RANGE: tl.constexpr, DROPOUT: tl.constexpr,
    SCALE_Q: tl.constexpr, PART: tl.constexpr,
    Q_VEC: tl.constexpr, KV_VEC: tl.constexpr,
):  # fmt: skip
    if not HAS_BIAS:
        width = 1  # the map is one column, and the compiler may know
    q_b, q_h, q_n = row_strides(q_b, q_h, q_n, Q_VEC)
    k_b, k_h, k_s = row_strides(k_b, k_h, k_s, KV_VEC)
    v_b, v_h, v_s = row_strides(v_b, v_h, v_s, KV_VEC)
    do_b, do_h, do_n = row_strides(do_b, do_h, do_n, Q_VEC)
    out_b, out_h, out_n = row_strides(out_b, out_h, out_n, Q_VEC)
    dq_b, dq_h, dq_n = row_strides(dq_b, dq_h, dq_n, D)
    M: tl.constexpr = R * C
    num_patches = tl.cdiv(height * HS, R) * tl.cdiv(width, C)
    i_bs = tl.program_id(0) // num_patches
    i_b = (i_bs // (num_heads // HS)).to(tl.int64)
    i_h = (i_bs % (num_heads // HS)).to(tl.int64) * HS
    row0, col0, i_in_stack, o_m, m_m = patch_queries(
        tl.program_id(0) % num_patches, height, width, HS, R, C
    )
    i_kv = i_h // heads_per_kv
    p_k += i_b * k_b + i_kv * k_h
    p_v += i_b * v_b + i_kv * v_h
    p_q += i_b * q_b + i_h * q_h
    p_do += i_b * do_b + i_h * do_h
    o_q = query_offsets(i_in_stack, o_m, q_h, q_n)
    o_do = query_offsets(i_in_stack, o_m, do_h, do_n)
    if HAS_BIAS:
        i_bg = i_b * (num_heads // heads_per_group) + i_h // heads_per_group
        p_taps += i_bg * tl.cdiv(num_keys, BN) * (2 * BN)
        p_table = table_of_head(p_table, i_h, table_h, row_pitch)

    # (M, DP)
    b_q = load_rows(p_q, o_q, 1, q_d, m_m, D, DP)
    if SCALE_Q:
        b_q = (b_q * q_factor).to(b_q.dtype)
    o_row0 = (i_b * num_heads + i_h) * height * width
    # All that the end needs to know of the queries, as registers are scarce.
    num_queries = height * width
    o_row = (i_in_stack * num_queries + o_m).to(tl.int32)
    # (M, DP)
    b_do = load_rows(p_do, o_do, 1, do_d, m_m, D, DP)
    p_out += i_b * out_b + i_h * out_h
    o_out = query_offsets(i_in_stack, o_m, out_h, out_n)
    b_out = load_rows(p_out, o_out, 1, out_d, m_m, D, DP)
    delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + o_row0 + o_row, delta, mask=m_m)
    # (M,) log2 of the softmax's denominator; infinite where there is no query
    lse2 = tl.load(p_lse + o_row0 + o_row, mask=m_m, other=float('inf'))
    lse2 *= LOG2E
    acc = tl.zeros([M, DP], tl.float32)

    for s0 in range(0, num_keys, BN):
        o_s = s0 + tl.arange(0, BN)
        m_s = o_s < num_keys
        # (DP, BN)
        b_k = load_columns(p_k, o_s.to(tl.int64), k_s, k_d, m_s, D, DP)
        b_v = load_columns(p_v, o_s.to(tl.int64), v_s, v_d, m_s, D, DP)
        if HAS_BIAS:
            bias = patch_bias(
                p_table, p_taps + 2 * s0, row0, col0, height, table_h, table_w,
                row_pitch, step_y, step_x, HS, R, C, BN, CW, NW, IN_RANGE,
            )  # fmt: skip
            bias = as_patch(bias, R, C, BN, NW).to(tl.float32)
        else:
            bias = tl.zeros([M, BN], tl.float32)
        if PART == DP:
            logits = dot(b_q, b_k, bias)
            grad = dot(b_do, b_v)
        else:
            o_s = o_s.to(tl.int64)
            logits = dot_in_parts(
                p_q, 1, q_d, o_q, m_m, q_factor, p_k, k_s, k_d,
                o_s, m_s, bias, head_dim, PART,
            )  # fmt: skip
            grad = dot_in_parts(
                p_do, 1, do_d, o_do, m_m, 1.0, p_v, v_s, v_d,
                o_s, m_s, tl.zeros([M, BN], tl.float32), head_dim, PART,
            )  # fmt: skip
        logits = mask_last_tile(logits, m_s, s0, num_keys, BN)
        weights = tl.exp2(logits * scale_log2 - lse2[:, None])
        if DROPOUT:
            grad *= keep_scale(
                seed, dropout_p, (o_row0 + o_row)[:, None], o_s[None, :], num_keys
            )
        grad = (weights * (grad - delta[:, None])).to(b_k.dtype)
        acc = dot(grad, tl.trans(b_k), acc)

    acc *= scale_log2 * q_factor * LN2
    p_dq += i_b * dq_b + i_h * dq_h
    o_dq = query_offsets(o_row // num_queries, o_row % num_queries, dq_h, dq_n)
    store_rows(p_dq, acc, o_dq, 1, m_m, D, DP)
