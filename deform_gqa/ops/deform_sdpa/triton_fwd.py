"""Forward kernel of deform_sdpa: samples and attends, point after point.

One program works on BQ queries and the query heads of one unit, which all attend the
same sample: four corners of k and of v are read once, with 16-byte loads along the
channels, and blended in registers. Softmax is online. k and v stay separate maps: an
interleaved copy would need as many loads of as many sectors.
"""

import triton
import triton.language as tl

from ..common.triton_tiles import LN2, keep_scale
from .triton_points import (
    axis_pixels,
    blend,
    corner_offsets,
    head_rows,
    load_corners,
    load_heads,
    store_heads,
    stride_of,
    tile_of_program,
)


@triton.jit(do_not_specialize=[
    "num_stacks", "num_blocks", "heads_sharing", "heads_per_kv", "heads_per_group",
    "num_heads", "query_views", "num_queries", "views", "points", "height", "width",
    "seed",
    "q_b", "q_w", "q_h", "q_n", "k_b", "k_w", "k_h", "v_b", "v_w", "v_h", "kv_m",
])  # fmt: skip
def deform_sdpa_fwd_kernel(
    p_q, p_k, p_v, p_coords, p_out, p_lse,
    q_b, q_w, q_h, q_n, k_b, k_w, k_h, v_b, v_w, v_h, kv_m,
    num_stacks, num_blocks, heads_sharing, heads_per_kv, heads_per_group,
    num_heads, query_views, num_queries, views, points, height, width,
    scale_log2, seed, dropout_p,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr,
    VEC: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    q_b, q_w = stride_of(q_b, STEP), stride_of(q_w, STEP)
    q_h, q_n = stride_of(q_h, STEP), stride_of(q_n, STEP)
    k_b, k_w, k_h = stride_of(k_b, STEP), stride_of(k_w, STEP), stride_of(k_h, STEP)
    v_b, v_w, v_h = stride_of(v_b, STEP), stride_of(v_w, STEP), stride_of(v_h, STEP)
    i_b, i_w, i_stack, i_block, o_n = tile_of_program(
        num_queries, query_views, num_blocks, num_stacks, BQ
    )
    head0 = i_stack * heads_sharing + i_block * BR
    heads_left = heads_sharing - i_block * BR
    o_row, m_row = head_rows(
        i_b, i_w, head0, heads_left, o_n, query_views, num_heads, num_queries, BR
    )
    # (BR, BQ, DP)
    b_q = load_heads(
        p_q + i_b * q_b + i_w * q_w, head0, o_n, q_h, q_n, m_row, BR, D, DP, VEC
    )
    b_q = b_q * scale_log2
    p_k += i_b * k_b + (head0 // heads_per_kv).to(tl.int64) * k_h
    p_v += i_b * v_b + (head0 // heads_per_kv).to(tl.int64) * v_h
    # Queries behind the last read the last one's points.
    num_groups = num_heads // heads_per_group
    o_group = (i_b * query_views + i_w) * num_groups + head0 // heads_per_group
    o_query = o_group * num_queries + tl.minimum(o_n, num_queries - 1)
    p_at = p_coords + o_query * (views * points * 2)

    peak = tl.full([BR, BQ], -1e30, tl.float32)
    total = tl.zeros([BR, BQ], tl.float32)
    acc = tl.zeros([BR, BQ, DP], tl.float32)
    for i_view in range(0, views):
        for i_point in range(0, points):
            # (BQ,)
            b_x = tl.load(p_at)
            b_y = tl.load(p_at + 1)
            p_at += 2
            x_0, x_1, w_x0, w_x1, _, _ = axis_pixels(b_x, width)
            y_0, y_1, w_y0, w_y1, _, _ = axis_pixels(b_y, height)
            w_00, w_01, w_10, w_11 = w_y0 * w_x0, w_y0 * w_x1, w_y1 * w_x0, w_y1 * w_x1
            o_00, o_01, o_10, o_11 = corner_offsets(
                x_0, x_1, y_0, y_1, width, kv_m, STEP, WIDE
            )
            # (BQ, DP)
            k_00, k_01, k_10, k_11 = load_corners(p_k, o_00, o_01, o_10, o_11, D, DP)
            v_00, v_01, v_10, v_11 = load_corners(p_v, o_00, o_01, o_10, o_11, D, DP)
            b_k = blend(k_00, k_01, k_10, k_11, w_00, w_01, w_10, w_11)
            # (BR, BQ)
            logits = tl.sum(b_q * b_k[None, :, :], 2)
            new_peak = tl.maximum(peak, logits)
            decay = tl.exp2(peak - new_peak)
            weights = tl.exp2(logits - new_peak)
            total = total * decay + weights
            peak = new_peak
            if DROPOUT:
                weights *= keep_scale(
                    seed, dropout_p, o_row, i_view * points + i_point, views * points
                )
            b_v = blend(v_00, v_01, v_10, v_11, w_00, w_01, w_10, w_11)
            acc = acc * decay[:, :, None] + weights[:, :, None] * b_v[None, :, :]
        p_k += k_w
        p_v += v_w

    store_heads(p_out, acc / total[:, :, None], o_row, m_row, D, DP, VEC)
    # (peak + log2(total)) * ln(2)
    lse = (peak + tl.log2(total)) * LN2
    tl.store(p_lse + o_row, lse, mask=m_row)
