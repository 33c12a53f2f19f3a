"""Backward kernel of deform_sdpa: all four gradients in one pass over the points.

The tiles are those of the forward kernel; the weights come back from the saved
log-sum-exp. The gradient of a sample is summed over the heads of its unit in
registers before it goes to memory: one atomic for each corner and channel of a kv
head, whatever the number of query heads. The gradient of a point is a sum over
channels and heads inside the program; only where several units or blocks of heads
share points does the host add their partial results.

dk and dv are sums by float32 atomics, or in 64-bit fixed point, whose sum has no
order, under torch.use_deterministic_algorithms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fixed_point import fixed_point_unit
from .sdpa_points import (
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
from .sdpa_problem import SdpaProblem, channels_last
from .tiles import keep_scale


@triton.jit
def add_channels(
    p, grad, o_pixel, o_d, m_n, unit,
    D: tl.constexpr, DP: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Adds (BQ, channels) at the offsets o_pixel (BQ,) and o_d, as int64 if FIXED."""
    p += o_pixel[:, None] + o_d[None, :]
    mask = m_n[:, None]
    if D != DP:
        mask = mask & (o_d < D)[None, :]
    if FIXED:
        tl.atomic_add(p, (grad * unit).to(tl.int64), mask=mask, sem='relaxed')
    else:
        tl.atomic_add(p, grad, mask=mask, sem='relaxed')


@triton.jit
def add_corner(
    p_grad, grad, o_pixel, weight, m_n, unit,
    D: tl.constexpr, DP: tl.constexpr, VEC: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Adds (BQ, DP) times the corner's weight to its pixel, if that is on the map.

    An atomic takes four numbers at most. Of a lane that holds eight, the first four
    go out together, then the last four: no number moves to another lane.
    """
    m_n = m_n & (weight != 0.0)
    grad = grad * weight[:, None]
    if VEC == 8:
        BQ: tl.constexpr = grad.shape[0]
        grad = tl.permute(tl.reshape(grad, (BQ, DP // 8, 2, 4)), (0, 1, 3, 2))
        first, last = tl.split(grad)
        o_d = tl.arange(0, DP // 2)
        o_d = o_d // 4 * 8 + o_d % 4
        first, last = tl.reshape(first, (BQ, DP // 2)), tl.reshape(last, (BQ, DP // 2))
        add_channels(p_grad, first, o_pixel, o_d, m_n, unit, D, DP, FIXED)
        add_channels(p_grad, last, o_pixel, o_d + 4, m_n, unit, D, DP, FIXED)
    else:
        add_channels(p_grad, grad, o_pixel, tl.arange(0, DP), m_n, unit, D, DP, FIXED)


@triton.jit
def add_corners(
    p_grad, grad, o_00, o_01, o_10, o_11, w_00, w_01, w_10, w_11, m_n, unit,
    D: tl.constexpr, DP: tl.constexpr, VEC: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    add_corner(p_grad, grad, o_00, w_00, m_n, unit, D, DP, VEC, FIXED)
    add_corner(p_grad, grad, o_01, w_01, m_n, unit, D, DP, VEC, FIXED)
    add_corner(p_grad, grad, o_10, w_10, m_n, unit, D, DP, VEC, FIXED)
    add_corner(p_grad, grad, o_11, w_11, m_n, unit, D, DP, VEC, FIXED)


@triton.jit
def weight_grad(grad_k, b_k, grad_v, b_v):
    """(BQ,) gradient of a corner's weight from what the corner holds (BQ, DP)."""
    return tl.sum(grad_k * b_k + grad_v * b_v, 1)


@triton.jit(do_not_specialize=[
    "num_units", "num_blocks", "heads_per_unit", "heads_per_kv", "heads_per_group",
    "num_heads", "query_views", "num_queries", "views", "points", "height", "width",
    "seed",
    "q_b", "q_w", "q_h", "q_n", "k_b", "k_w", "k_h", "v_b", "v_w", "v_h", "kv_m",
    "do_b", "do_w", "do_h", "do_n",
])  # fmt: skip
def deform_sdpa_bwd_kernel(
    p_q, p_k, p_v, p_coords, p_out, p_do, p_lse, p_dq, p_dk, p_dv, p_dcoords, p_units,
    q_b, q_w, q_h, q_n, k_b, k_w, k_h, v_b, v_w, v_h, kv_m, do_b, do_w, do_h, do_n,
    num_units, num_blocks, heads_per_unit, heads_per_kv, heads_per_group,
    num_heads, query_views, num_queries, views, points, height, width,
    scale_log2, seed, dropout_p,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr,
    VEC: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr,
    FIXED: tl.constexpr,
):  # fmt: skip
    LN_2: tl.constexpr = 0.6931471805599453
    q_b, q_w = stride_of(q_b, UNIT), stride_of(q_w, UNIT)
    q_h, q_n = stride_of(q_h, UNIT), stride_of(q_n, UNIT)
    k_b, k_w, k_h = stride_of(k_b, UNIT), stride_of(k_w, UNIT), stride_of(k_h, UNIT)
    v_b, v_w, v_h = stride_of(v_b, UNIT), stride_of(v_w, UNIT), stride_of(v_h, UNIT)
    do_b, do_w = stride_of(do_b, UNIT), stride_of(do_w, UNIT)
    do_h, do_n = stride_of(do_h, UNIT), stride_of(do_n, UNIT)
    i_b, i_w, i_unit, i_block, o_n = tile_of_program(
        num_queries, query_views, num_blocks, num_units, BQ
    )
    m_n = o_n < num_queries
    head0 = i_unit * heads_per_unit + i_block * BR
    heads_left = heads_per_unit - i_block * BR
    o_row, m_row = head_rows(
        i_b, i_w, head0, heads_left, o_n, query_views, num_heads, num_queries, BR
    )
    # (BR, BQ, DP)
    b_do = load_heads(
        p_do + i_b * do_b + i_w * do_w, head0, o_n, do_h, do_n, m_row, BR, D, DP, VEC
    )
    out_h = num_queries * D
    p_out += (i_b * query_views + i_w) * num_heads * out_h
    b_out = load_heads(p_out, head0, o_n, out_h, D, m_row, BR, D, DP, VEC)
    # (BR, BQ)
    delta = tl.sum(b_do * b_out, 2)
    lse2 = tl.load(p_lse + o_row, mask=m_row, other=float('inf')) / LN_2
    # (BR, BQ, DP)
    b_q = load_heads(
        p_q + i_b * q_b + i_w * q_w, head0, o_n, q_h, q_n, m_row, BR, D, DP, VEC
    )
    b_q = b_q * scale_log2
    acc = tl.zeros([BR, BQ, DP], tl.float32)

    i_kv = (head0 // heads_per_kv).to(tl.int64)
    p_k += i_b * k_b + i_kv * k_h
    p_v += i_b * v_b + i_kv * v_h
    num_kv = num_heads // heads_per_kv
    o_map = (i_b * views * num_kv + i_kv) * height * width * D
    p_dk += o_map
    p_dv += o_map
    unit_k, unit_v = 1.0, 1.0
    if FIXED:
        unit_k, unit_v = tl.load(p_units), tl.load(p_units + 1)

    # Queries behind the last read the last one's points.
    o_last = tl.minimum(o_n, num_queries - 1)
    i_view = i_b * query_views + i_w
    num_groups = num_heads // heads_per_group
    o_group = i_view * num_groups + head0 // heads_per_group
    p_at = p_coords + (o_group * num_queries + o_last) * (views * points * 2)
    # (B, Vq, units * blocks, N, V, P, 2)
    o_part = (i_view * num_units + i_unit) * num_blocks + i_block
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
                x_0, x_1, y_0, y_1, width, kv_m, UNIT, WIDE
            )
            w_00, w_01, w_10, w_11 = w_y0 * w_x0, w_y0 * w_x1, w_y1 * w_x0, w_y1 * w_x1
            # (BQ, DP)
            k_00, k_01, k_10, k_11 = load_corners(p_k, o_00, o_01, o_10, o_11, D, DP)
            v_00, v_01, v_10, v_11 = load_corners(p_v, o_00, o_01, o_10, o_11, D, DP)
            b_k = blend(k_00, k_01, k_10, k_11, w_00, w_01, w_10, w_11)
            b_v = blend(v_00, v_01, v_10, v_11, w_00, w_01, w_10, w_11)
            # (BR, BQ)
            weights = tl.exp2(tl.sum(b_q * b_k[None, :, :], 2) - lse2)
            grad = tl.sum(b_do * b_v[None, :, :], 2)
            dropped = weights
            if DROPOUT:
                keep = keep_scale(
                    seed, dropout_p, o_row, i_v * points + i_point, views * points
                )
                grad *= keep
                dropped = weights * keep
            grad = weights * (grad - delta)
            acc += grad[:, :, None] * b_k[None, :, :]
            # (BQ, DP)
            grad_k = tl.sum(grad[:, :, None] * b_q, 0) * LN_2
            grad_v = tl.sum(dropped[:, :, None] * b_do, 0)
            o_00, o_01, o_10, o_11 = corner_offsets(
                x_0, x_1, y_0, y_1, width, 1, D, WIDE
            )
            add_corners(
                p_dk, grad_k, o_00, o_01, o_10, o_11, w_00, w_01, w_10, w_11,
                m_n, unit_k, D, DP, VEC, FIXED,
            )  # fmt: skip
            add_corners(
                p_dv, grad_v, o_00, o_01, o_10, o_11, w_00, w_01, w_10, w_11,
                m_n, unit_v, D, DP, VEC, FIXED,
            )  # fmt: skip
            # (BQ,)
            g_00 = weight_grad(grad_k, k_00, grad_v, v_00)
            g_01 = weight_grad(grad_k, k_01, grad_v, v_01)
            g_10 = weight_grad(grad_k, k_10, grad_v, v_10)
            g_11 = weight_grad(grad_k, k_11, grad_v, v_11)
            grad_x = (w_y0 * g_01 + w_y1 * g_11) * in_x1
            grad_x -= (w_y0 * g_00 + w_y1 * g_10) * in_x0
            grad_y = (w_x0 * g_10 + w_x1 * g_11) * in_y1
            grad_y -= (w_x0 * g_00 + w_x1 * g_01) * in_y0
            grad_at = tl.join(grad_x * (width - 1), grad_y * (height - 1))
            p = p_dat[:, None] + tl.arange(0, 2)[None, :]
            tl.store(p, grad_at, mask=m_n[:, None])
            p_dat += 2
        p_k += k_w
        p_v += v_w
        p_dk += num_kv.to(tl.int64) * height * width * D
        p_dv += num_kv.to(tl.int64) * height * width * D

    store_heads(p_dq, acc * (scale_log2 * LN_2), o_row, m_row, D, DP, VEC)


def deform_sdpa_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and coords, in their shapes and dtypes.

    The same inputs give the same bits under torch.use_deterministic_algorithms.
    """
    if q.numel() == 0:
        return tuple(
            torch.zeros_like(x, memory_format=torch.contiguous_format)
            for x in (q, k, v, coords)
        )
    grad_out = channels_last(grad_out)
    problem = SdpaProblem(
        q, k, v, coords, seed, grid_size, scale, dropout_p, grad_out.stride()[:4]
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    units = _fixed_point_units(problem, grad_out) if deterministic else None
    tile = problem.tile('deform_sdpa_bwd' + '_fixed' * deterministic)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dtype = torch.int64 if deterministic else torch.float32
    grad_k, grad_v = (k.new_zeros(k.shape, dtype=dtype) for _ in range(2))
    # (B, Vq, units * blocks, N, V, P, 2)
    shape = (*coords.shape[:2], problem.parts(tile), *coords.shape[3:])
    grad_coords = coords.new_empty(shape)
    deform_sdpa_bwd_kernel[problem.grid(tile)](
        problem.q,
        problem.k,
        problem.v,
        problem.coords,
        out,
        grad_out,
        lse,
        grad_q,
        grad_k,
        grad_v,
        grad_coords,
        units,
        *problem.input_strides(),
        **problem.arguments(tile),
        FIXED=deterministic,
        **tile.options,
    )
    if deterministic:
        grad_k, grad_v = grad_k.double() / units[0], grad_v.double() / units[1]
    if problem.parts(tile) > problem.groups:
        grad_coords = grad_coords.unflatten(2, (problem.groups, -1)).sum(3)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_coords


def _fixed_point_units(problem: SdpaProblem, grad_out: Tensor) -> Tensor:
    """(2,) units of dk and dv: their sums at a pixel cannot overflow.

    The weights of one query and head sum to 1 before dropout, so it adds at most
    |grad_out| to dv, and to dk at most scale * |q| times twice the largest
    derivative of a weight, which is below the product of the norms of grad_out and v.
    """
    queries = problem.query_views * problem.queries
    count = queries * problem.heads // problem.kv_heads / (1 - problem.dropout_p)
    norm_grad = grad_out.float().norm(dim=-1).amax()
    norm_v = problem.v.float().norm(dim=-1).amax()
    bound_v = norm_grad * count
    bound_k = 2 * abs(problem.scale) * bound_v * norm_v * problem.q.float().abs().amax()
    return torch.stack([fixed_point_unit(b) for b in (bound_k, bound_v)])
