"""Backward kernel of deform_sdpa: all four gradients in one pass over the points.

k with q and v with the gradient of out are two sides of one tile (2, BQ, DP): what
is done to one is done to the other. q.k and dout.v are one reduction, the gradients
of k and v one sum over heads, and the weights and their gradients are all that the
sides exchange. A lane holds one side, so that half the registers hold a corner.

The weights come back from the saved log-sum-exp. The gradient of a sample is summed
over the heads of its stack in registers before it goes to memory: one atomic for each
corner and channel of a kv head, whatever the number of query heads. The gradient of a
point is a sum over channels and heads inside the program; only where several stacks or
blocks of heads share points does the host add their partial results.

dk and dv are sums by float32 atomics, or in 64-bit fixed point, whose sum has no
order, under torch.use_deterministic_algorithms.
"""

import triton
import triton.language as tl

from ..common.triton_tiles import LN2, keep_scale
from .triton_points import (
    axis_pixels,
    blend,
    channel_vectors,
    corner_offsets,
    store_heads,
    stride_of,
    tile_of_program,
)


@triton.jit
def head_mask(i_head, heads_left, o_n, num_queries):
    """(1, BQ) queries that exist, of a head that does."""
    return (o_n < tl.where(i_head < heads_left, num_queries, 0))[None, :]


@triton.jit
def kept_heads(seed, dropout_p, o_row, o_key, num_keys):
    """(BQ,) bits of the heads that dropout keeps, from the rows (BR, BQ).

    Drawn for all heads at once, the numbers are spread over the lanes.
    """
    is_kept = keep_scale(seed, dropout_p, o_row, o_key, num_keys) > 0
    return tl.sum(is_kept.to(tl.int32) << tl.arange(0, o_row.shape[0])[:, None], 0)


@triton.jit
def load_query_rows(
    p_1, p_2, o_1, o_2, mask, D: tl.constexpr, DP: tl.constexpr, VEC: tl.constexpr
):
    """(2, BQ, DP) rows at the offsets (BQ,) of each side, zero where masked.

    Args:
        mask: (2 or 1, BQ) rows to load.
    """
    o_d, m_d = channel_vectors(D, DP, VEC)
    o_1, o_2 = o_1[None, :, None, None] + o_d, o_2[None, :, None, None] + o_d
    # The compiler sees what is contiguous in either address, not in a choice of bases.
    is_first = (tl.arange(0, 2) == 0)[:, None, None, None]
    p = tl.where(is_first, p_1 + o_1, p_2 + o_2)
    mask = mask[:, :, None, None]
    if D != DP:
        mask = mask & m_d
    b = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    return tl.reshape(b, (2, mask.shape[1], DP))


@triton.jit
def load_corner(p_k, p_v, o_pixel, D: tl.constexpr, DP: tl.constexpr):
    """(2, BQ, DP) channels of one pixel of k and v for each query, in float32."""
    o_d = tl.arange(0, DP)[None, None, :]
    o = o_pixel[None, :, None] + o_d
    is_k = (tl.arange(0, 2) == 0)[:, None, None]
    p = tl.where(is_k, p_k + o, p_v + o)
    if D == DP:
        b = tl.load(p)
    else:
        b = tl.load(p, mask=o_d < D, other=0.0)
    return b.to(tl.float32)


@triton.jit
def add_channels(
    p, grad, o_pixel, o_d, mask, unit,
    D: tl.constexpr, DP: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Adds (2, BQ, channels) at the offsets o_pixel (BQ,) and o_d, int64 if FIXED."""
    p += o_pixel[None, :, None] + o_d[None, None, :]
    if D != DP:
        mask = mask & (o_d < D)[None, None, :]
    if FIXED:
        tl.atomic_add(p, (grad * unit).to(tl.int64), mask=mask, sem='relaxed')
    else:
        tl.atomic_add(p, grad, mask=mask, sem='relaxed')


@triton.jit
def add_corner(
    p_grad, grad, o_pixel, weight, m_n, unit,
    D: tl.constexpr, DP: tl.constexpr, VEC: tl.constexpr, ATOM: tl.constexpr,
    FIXED: tl.constexpr,
):  # fmt: skip
    """Adds (2, BQ, DP) times the corner's weight to its pixel, if that is on the map.

    Of a lane that holds eight channels where an atomic takes four, the first four go
    out together, then the last four: no number moves to another lane.
    """
    mask = (m_n & (weight != 0.0))[None, :, None]
    grad = grad * weight[None, :, None]
    if VEC == 2 * ATOM:
        BQ: tl.constexpr = grad.shape[1]
        HALF: tl.constexpr = DP // 2
        grad = tl.reshape(grad, (2, BQ, DP // VEC, 2, ATOM))
        first, last = tl.split(tl.permute(grad, (0, 1, 2, 4, 3)))
        first, last = tl.reshape(first, (2, BQ, HALF)), tl.reshape(last, (2, BQ, HALF))
        o_d = tl.arange(0, HALF)
        o_d = o_d // ATOM * VEC + o_d % ATOM
        add_channels(p_grad, first, o_pixel, o_d, mask, unit, D, DP, FIXED)
        add_channels(p_grad, last, o_pixel, o_d + ATOM, mask, unit, D, DP, FIXED)
    else:
        add_channels(p_grad, grad, o_pixel, tl.arange(0, DP), mask, unit, D, DP, FIXED)


@triton.jit
def weight_grad(grad, b, VEC: tl.constexpr):
    """(2, BQ, DP / VEC) gradient of a corner's weight, summed within each lane."""
    S: tl.constexpr = grad.shape[0]
    BQ: tl.constexpr = grad.shape[1]
    return tl.sum(tl.reshape(grad * b, (S, BQ, grad.shape[2] // VEC, VEC)), 3)


@triton.jit
def sum_lanes(x):
    """(BQ,) from (2, BQ, DP / VEC)."""
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit(do_not_specialize=[
    "num_stacks", "num_blocks", "heads_sharing", "heads_per_kv", "heads_per_group",
    "num_heads", "query_views", "num_queries", "views", "points", "height", "width",
    "seed", "num_rows",
    "q_b", "q_w", "q_h", "q_n", "k_b", "k_w", "k_h", "v_b", "v_w", "v_h", "kv_m",
    "do_b", "do_w", "do_h", "do_n",
])  # fmt: skip
def deform_sdpa_bwd_kernel(
    p_q, p_k, p_v, p_coords, p_out, p_do, p_lse, p_dq, p_dkv, p_dcoords, p_units,
    num_rows,
    q_b, q_w, q_h, q_n, k_b, k_w, k_h, v_b, v_w, v_h, kv_m, do_b, do_w, do_h, do_n,
    num_stacks, num_blocks, heads_sharing, heads_per_kv, heads_per_group,
    num_heads, query_views, num_queries, views, points, height, width,
    scale_log2, seed, dropout_p,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr,
    VEC: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr,
    ATOM: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    q_b, q_w = stride_of(q_b, STEP), stride_of(q_w, STEP)
    q_h, q_n = stride_of(q_h, STEP), stride_of(q_n, STEP)
    k_b, k_w, k_h = stride_of(k_b, STEP), stride_of(k_w, STEP), stride_of(k_h, STEP)
    v_b, v_w, v_h = stride_of(v_b, STEP), stride_of(v_w, STEP), stride_of(v_h, STEP)
    do_b, do_w = stride_of(do_b, STEP), stride_of(do_w, STEP)
    do_h, do_n = stride_of(do_h, STEP), stride_of(do_n, STEP)
    i_b, i_w, i_stack, i_block, o_n = tile_of_program(
        num_queries, query_views, num_blocks, num_stacks, BQ
    )
    m_n = o_n < num_queries
    head0 = i_stack * heads_sharing + i_block * BR
    heads_left = heads_sharing - i_block * BR
    p_q += i_b * q_b + i_w * q_w
    p_do += i_b * do_b + i_w * do_w
    p_out += (i_b * query_views + i_w) * num_heads * num_queries * D
    row0 = ((i_b * query_views + i_w) * num_heads + head0) * num_queries
    # (BR, BQ)
    o_rows = row0 + tl.arange(0, BR)[:, None] * num_queries + o_n[None, :]
    # Not by rows: the compiler would keep those until dq is stored, and spill.
    p_lse += row0 + o_n[None, :]
    side = tl.arange(0, 2)
    is_k, is_v = (side == 0)[:, None], (side == 1)[:, None]
    scale = scale_log2 * LN2
    to_log2 = tl.where(is_k, 1 / LN2, 1.0)
    # Of each head: q and dout, what is taken off q.k and dout.v, the sum for dq.
    b_heads, minus, accs = (), (), ()
    for i_r in tl.static_range(BR):
        m_row = head_mask(i_r, heads_left, o_n, num_queries)
        head = (head0 + i_r).to(tl.int64)
        o_q = head * q_h + o_n.to(tl.int64) * q_n
        o_do = head * do_h + o_n.to(tl.int64) * do_n
        # (2, BQ, DP)
        b_head = load_query_rows(p_q, p_do, o_q, o_do, m_row, D, DP, VEC)
        m_out = m_row & is_v
        o_out = head * num_queries * D + o_n.to(tl.int64) * D
        b_out = load_query_rows(p_out, p_out, o_out, o_out, m_out, D, DP, VEC)
        # (1, BQ)
        delta = tl.sum(tl.sum(b_head * b_out, 2), 0)[None, :]
        b_lse = tl.load(p_lse + i_r * num_queries, mask=m_row, other=float('inf'))
        minus += (tl.where(is_k, b_lse / LN2, delta),)
        b_heads += (b_head * tl.where(is_k, scale, 1.0)[:, :, None],)
        accs += (tl.zeros([2, BQ, DP], tl.float32),)

    i_kv = (head0 // heads_per_kv).to(tl.int64)
    p_k += i_b * k_b + i_kv * k_h
    p_v += i_b * v_b + i_kv * v_h
    num_kv = num_heads // heads_per_kv
    # dk, then dv of num_rows pixels: one base, whose alignment the compiler sees.
    o_side = side.to(tl.int64) * num_rows
    o_map = (i_b * views * num_kv + i_kv) * height * width
    p_dkv += ((o_side + o_map) * D)[:, None, None]
    unit = 1.0
    if FIXED:
        unit = tl.load(p_units + side)[:, None, None]

    # Queries behind the last read the last one's points.
    o_last = tl.minimum(o_n, num_queries - 1)
    i_view = i_b * query_views + i_w
    num_groups = num_heads // heads_per_group
    o_group = i_view * num_groups + head0 // heads_per_group
    p_at = p_coords + (o_group * num_queries + o_last) * (views * points * 2)
    # (B, Vq, stacks * blocks, N, V, P, 2)
    o_part = (i_view * num_stacks + i_stack) * num_blocks + i_block
    p_dat = p_dcoords + (o_part * num_queries + o_last) * (views * points * 2)

    for i_v in range(0, views):
        for i_point in range(0, points):
            # (BQ,)
            b_x = tl.load(p_at)
            b_y = tl.load(p_at + 1)
            p_at += 2
            x_0, x_1, w_x0, w_x1, in_x0, in_x1 = axis_pixels(b_x, width)
            y_0, y_1, w_y0, w_y1, in_y0, in_y1 = axis_pixels(b_y, height)
            o_00, o_01, o_10, o_11 = corner_offsets(
                x_0, x_1, y_0, y_1, width, kv_m, STEP, WIDE
            )
            w_00, w_01, w_10, w_11 = w_y0 * w_x0, w_y0 * w_x1, w_y1 * w_x0, w_y1 * w_x1
            # (2, BQ, DP)
            b_00 = load_corner(p_k, p_v, o_00, D, DP)
            b_01 = load_corner(p_k, p_v, o_01, D, DP)
            b_10 = load_corner(p_k, p_v, o_10, D, DP)
            b_11 = load_corner(p_k, p_v, o_11, D, DP)
            b_kv = blend(b_00, b_01, b_10, b_11, w_00, w_01, w_10, w_11)
            if DROPOUT:
                kept = kept_heads(
                    seed, dropout_p, o_rows, i_v * points + i_point, views * points
                )
            grad_kv = tl.zeros([2, BQ, DP], tl.float32)
            new_accs = ()
            for i_r in tl.static_range(BR):
                # (2, BQ): the logit, then the gradient of the weight.
                x = tl.sum(b_heads[i_r] * b_kv, 2)
                keep = 1.0
                if DROPOUT:
                    keep = tl.where((kept >> i_r) & 1 != 0, 1 / (1 - dropout_p), 0.0)
                    x *= tl.where(is_k, 1.0, keep[None, :])
                x = x * to_log2 - minus[i_r]
                other = tl.flip(x, 0)
                weights = tl.exp2(tl.where(is_k, x, other))
                # The gradient of the logit, then the weight.
                x = weights * tl.where(is_k, other, keep)
                # dq is the side of k; that of v sums what nobody reads.
                new_accs += (accs[i_r] + x[:, :, None] * b_kv,)
                grad_kv += x[:, :, None] * b_heads[i_r]
            accs = new_accs
            o_00, o_01, o_10, o_11 = corner_offsets(
                x_0, x_1, y_0, y_1, width, 1, D, WIDE
            )
            # Corner after corner, so that few are held.
            g_00 = weight_grad(grad_kv, b_00, VEC)
            add_corner(p_dkv, grad_kv, o_00, w_00, m_n, unit, D, DP, VEC, ATOM, FIXED)
            g_01 = weight_grad(grad_kv, b_01, VEC)
            add_corner(p_dkv, grad_kv, o_01, w_01, m_n, unit, D, DP, VEC, ATOM, FIXED)
            g_10 = weight_grad(grad_kv, b_10, VEC)
            add_corner(p_dkv, grad_kv, o_10, w_10, m_n, unit, D, DP, VEC, ATOM, FIXED)
            g_11 = weight_grad(grad_kv, b_11, VEC)
            add_corner(p_dkv, grad_kv, o_11, w_11, m_n, unit, D, DP, VEC, ATOM, FIXED)
            # (2, BQ, DP / VEC)
            grad_x = (w_y0[:, None] * g_01 + w_y1[:, None] * g_11) * in_x1[:, None]
            grad_x -= (w_y0[:, None] * g_00 + w_y1[:, None] * g_10) * in_x0[:, None]
            grad_y = (w_x0[:, None] * g_10 + w_x1[:, None] * g_11) * in_y1[:, None]
            grad_y -= (w_x0[:, None] * g_00 + w_x1[:, None] * g_01) * in_y0[:, None]
            # (BQ, 2)
            grad_at = tl.join(
                sum_lanes(grad_x) * (width - 1), sum_lanes(grad_y) * (height - 1)
            )
            p = p_dat[:, None] + tl.arange(0, 2)[None, :]
            tl.store(p, grad_at, mask=m_n[:, None])
            p_dat += 2
        p_k += k_w
        p_v += v_w
        p_dkv += (num_kv * D).to(tl.int64) * (height * width)

    for i_r in tl.static_range(BR):
        o_row = tl.broadcast_to((row0 + i_r * num_queries + o_n)[None, :], (2, BQ))
        m_row = is_k & head_mask(i_r, heads_left, o_n, num_queries)
        store_heads(p_dq, accs[i_r] * scale, o_row, m_row, D, DP, VEC)
