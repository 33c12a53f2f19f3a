"""Forward kernel of deform_attn: online softmax with the bias as a batched product.

One program works on a patch of R x C queries of one head and walks over the keys in
tiles of BN. The bias of a tile comes from ``triton_bias.py`` and is the initial value
of the accumulator of q k^T, so adding it is free; the table is packed divided by the
scale of the logits to that end. exp is exp2 and the scale is folded into its
argument.

The query heads of a kv head are stacked: the rows of their maps make one list, in which
the heads alternate, and a patch is R rows of that list. So K and V are loaded and
column weights computed once for the group, whatever its size, and the list wastes less
at its end than every map would. A kv head that serves several offset groups has one
list for each, as their positions differ.
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
    patch_queries,
    query_offsets,
    row_strides,
    store_rows,
)
from .triton_bias import as_patch, patch_bias
from .triton_pack_table import table_of_head


@triton.jit
def mask_last_tile(x, m_s, s0, num_keys, BN: tl.constexpr):
    """-inf for the keys behind the last one; a branch, as only one tile has any."""
    if s0 + BN > num_keys:
        x = tl.where(m_s[None, :], x, -float('inf'))
    return x


@triton.constexpr_function
def sums_by_product(dtype, dropout):
    """Whether the weights are summed as they enter the product with V, in 16 bits.

    Then the sums are a product with ones, for which the tensor cores have time; with
    dropout what enters is not what the softmax sums.
    """
    return dtype != tl.float32 and not dropout


@triton.jit
def zero_row_sums(M: tl.constexpr, DTYPE: tl.constexpr, DROPOUT: tl.constexpr):
    """(M, 8), the narrowest product, or (M,)."""
    if sums_by_product(DTYPE, DROPOUT):
        return tl.zeros([M, 8], tl.float32)
    else:
        return tl.zeros([M], tl.float32)


@triton.jit
def add_row_sums(total, weights, decay, DTYPE: tl.constexpr, DROPOUT: tl.constexpr):
    """total * decay and the sums of the rows of weights (M, BN)."""
    if sums_by_product(DTYPE, DROPOUT):
        ones = tl.full([weights.shape[1], 8], 1.0, DTYPE)
        return dot(weights.to(DTYPE), ones, total * decay[:, None])
    else:
        return total * decay + tl.sum(weights, 1)


@triton.jit
def finish_row_sums(total, DTYPE: tl.constexpr, DROPOUT: tl.constexpr):
    """(M,) sums; the eight columns of a product are the same."""
    if sums_by_product(DTYPE, DROPOUT):
        return tl.max(total, 1)
    else:
        return total


@triton.jit(do_not_specialize=[
    "num_heads", "heads_per_kv", "heads_per_group", "num_keys", "head_dim", "height",
    "width", "table_h", "table_w", "row_pitch", "seed",
])  # fmt: skip
def deform_attn_fwd_kernel(
    p_q, p_k, p_v, p_taps, p_table, p_out, p_lse,
    q_b, q_h, q_n, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    out_b, out_h, out_n,
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
    out_b, out_h, out_n = row_strides(out_b, out_h, out_n, D)
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
    if HAS_BIAS:
        i_bg = i_b * (num_heads // heads_per_group) + i_h // heads_per_group
        p_taps += i_bg * tl.cdiv(num_keys, BN) * (2 * BN)
        p_table = table_of_head(p_table, i_h, table_h, row_pitch)

    p_q += i_b * q_b + i_h * q_h
    o_q = query_offsets(i_in_stack, o_m, q_h, q_n)
    # (M, DP)
    b_q = load_rows(p_q, o_q, 1, q_d, m_m, D, DP)
    if SCALE_Q:
        b_q = (b_q * q_factor).to(b_q.dtype)
    peak = tl.full([M], -1e30, tl.float32)
    total = zero_row_sums(M, p_k.dtype.element_ty, DROPOUT)
    acc = tl.zeros([M, DP], tl.float32)
    o_row0 = (i_b * num_heads + i_h) * height * width
    # All that the end needs to know of the queries, as registers are scarce.
    num_queries = height * width
    o_row = (i_in_stack * num_queries + o_m).to(tl.int32)

    for s0 in range(0, num_keys, BN):
        o_s = s0 + tl.arange(0, BN)
        m_s = o_s < num_keys
        # (DP, BN)
        b_k = load_columns(p_k, o_s.to(tl.int64), k_s, k_d, m_s, D, DP)
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
        else:
            logits = dot_in_parts(
                p_q, 1, q_d, o_q, m_m, q_factor, p_k, k_s, k_d,
                o_s.to(tl.int64), m_s, bias, head_dim, PART,
            )  # fmt: skip
        logits = mask_last_tile(logits, m_s, s0, num_keys, BN)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits * scale_log2 - (new_peak * scale_log2)[:, None])
        decay = tl.exp2((peak - new_peak) * scale_log2)
        total = add_row_sums(total, weights, decay, p_k.dtype.element_ty, DROPOUT)
        if DROPOUT:
            weights *= keep_scale(
                seed, dropout_p, (o_row0 + o_row)[:, None], o_s[None, :], num_keys
            )
        # (BN, DP)
        b_v = load_rows(p_v, o_s.to(tl.int64), v_s, v_d, m_s, D, DP)
        acc = dot(weights.to(b_v.dtype), b_v, acc * decay[:, None])
        peak = new_peak

    total = finish_row_sums(total, p_k.dtype.element_ty, DROPOUT)
    acc = acc / total[:, None]
    p_out += i_b * out_b + i_h * out_h
    o_out = query_offsets(o_row // num_queries, o_row % num_queries, out_h, out_n)
    store_rows(p_out, acc, o_out, 1, m_m, D, DP)
    # (peak * scale_log2 + log2(total)) * ln(2)
    lse = (peak * scale_log2 + tl.log2(total)) * LN2
    tl.store(p_lse + o_row0 + o_row, lse, mask=m_m)
