"""Backward kernel of deform_attn for k, v, pos and the table.

One program keeps BN keys of a kv head and walks over the query heads of that head
and their patches of queries, so that dk and dv are sums in registers over the whole
group and K and V are loaded once for it. What the bias gets is contracted along the
columns of the patch first (a batched product, as in forward), then along its rows (a
second one), and only these sums over table cells go to memory by atomics: about 0.14 a
(query, key) pair at the steps of a detection map, where one per tap would be 4.

Gradients of the positions come from the same products. Bilinear interpolation moves
with t by the rise from the table's cell to the next, so the weights of the cells stand
beside an indicator of the cell that t lies in, and what gathers there is multiplied
with the rises of the few table cells that a patch reaches.

One launch computes all of this (KEY_GRAD and BIAS_GRAD) or, where the registers do not
suffice, two launches one part each.

The queries are split over ``num_splits`` programs a key tile, whose partial results
the host adds, so that dk, dv and dpos need no atomics.
"""

import triton
import triton.language as tl

from ..common.triton_tiles import (
    LN2,
    LOG2E,
    dot,
    dot_in_parts,
    keep_scale,
    load_rows,
    patch_queries,
    row_strides,
    store_rows,
)
from .triton_bias import (
    as_keys,
    as_patch,
    bias_product,
    contract_columns,
    contract_rows,
    load_rises,
    load_taps,
    query_rows,
    row_taps,
)
from .triton_key_taps import key_order
from .triton_pack_table import table_of_head


@triton.jit
def add_to_table(p_dtable, x, o_row, o_col, rows, cols, unit, FIXED: tl.constexpr):
    """Atomic add of what is not zero; as integers, whose sum has no order, if FIXED."""
    mask = (x != 0.0) & (o_row < rows) & (o_col < cols)
    p = p_dtable + (o_row * cols + o_col)
    if FIXED:
        tl.atomic_add(p, (x * unit).to(tl.int64), mask=mask, sem='relaxed')
    else:
        tl.atomic_add(p, x, mask=mask, sem='relaxed')


@triton.jit
def add_product(x, b_rows, acc, always):
    """acc (BN, DP) + x^T b_rows, of x (M, BN) and b_rows (M, DP).

    Triton divides the tiles of products that feed each other in one way among the
    warps. Here it would take that of this narrow product, and the warps would repeat
    each other's softmax; it does not look into a branch (which is always taken).
    """
    if always:
        acc = dot(tl.trans(x), b_rows, acc)
    return acc


@triton.jit
def bias_gradient(
    grad, p_taps, p_table, p_dtable, row0, col0, height, table_h, table_w,
    row_pitch, step_y, step_x, unit,
    R: tl.constexpr, C: tl.constexpr, CW: tl.constexpr, RW: tl.constexpr,
    BN: tl.constexpr, NW: tl.constexpr, IN_RANGE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Adds the gradient (M, BN) of the bias of a patch to the table's.

    Returns:
        Summands of the gradients of t_y and t_x: (BN, CW, RW), or (BN, CW, R) if the
        patch reaches too many table rows for summing over its rows first (RW == 0).
    """
    b_ty, b_corner, start, b_u = load_taps(
        p_taps, col0, step_x, table_h, table_w, row_pitch, BN, NW
    )
    t = b_ty[:, None] + query_rows(row0, height, 1, R)[None, :] * step_y
    cell, fraction, inside = row_taps(t, table_h, IN_RANGE)
    # Means over the columns, where sums that become float16 again could overflow.
    PEAK: tl.constexpr = 1.0 / C if RW > 0 else 1.0
    sums = contract_columns(as_keys(grad, R, C, BN, NW), b_u, step_x, CW, PEAK)
    o_col = start[:, None, None] + tl.arange(0, CW)[None, :, None]
    rows, cols = table_h + 4, table_w + 4
    if RW > 0:
        first, _, _ = row_taps(b_ty + row0 * step_y, table_h, IN_RANGE)
        origin = first.to(tl.float32)[:, None]
        at_cell = cell.to(tl.float32) - origin
        if not IN_RANGE:
            t = tl.minimum(tl.maximum(t, -1.0), table_h)
            at_cell = tl.where(inside, at_cell, -1.0)
        sums = sums.to(grad.dtype)
        x, grad_y, grad_x = contract_rows(sums, t - origin, at_cell, RW, 1.0 * C)
        row = first[:, None] + tl.arange(0, RW)[None, :]
        down, right = load_rises(p_table, b_corner, row, row_pitch, table_h, CW)
        o_row = (row + 1)[:, None, :]
        add_to_table(p_dtable, x, o_row, o_col, rows, cols, unit, FIXED)
    else:
        grad_rows, grad_x = tl.split(
            tl.permute(tl.reshape(sums, (BN, 2, CW, R)), (0, 2, 3, 1))
        )
        down, right = load_rises(p_table, b_corner, cell, row_pitch, table_h, CW)
        _, below = load_rises(p_table, b_corner, cell + 1, row_pitch, table_h, CW)
        fraction = fraction[:, None, :]
        right += (below - right) * fraction
        o_row = (cell + 1)[:, None, :]
        x = grad_rows * (1.0 - fraction)
        add_to_table(p_dtable, x, o_row, o_col, rows, cols, unit, FIXED)
        x = grad_rows * fraction
        add_to_table(p_dtable, x, o_row + 1, o_col, rows, cols, unit, FIXED)
        grad_y = tl.where(inside[:, None, :], grad_rows, 0.0)
    return grad_y * down, grad_x * right


@triton.jit(do_not_specialize=[
    "num_heads", "heads_per_kv", "heads_per_group", "num_keys", "head_dim", "height",
    "width", "table_h", "table_w", "row_pitch", "seed", "num_splits", "num_copies",
])  # fmt: skip
def deform_attn_dkdv_kernel(
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
    if not HAS_BIAS:
        width = 1  # the map is one column, and the compiler may know
    q_b, q_h, q_n = row_strides(q_b, q_h, q_n, Q_VEC)
    k_b, k_h, k_s = row_strides(k_b, k_h, k_s, KV_VEC)
    v_b, v_h, v_s = row_strides(v_b, v_h, v_s, KV_VEC)
    do_b, do_h, do_n = row_strides(do_b, do_h, do_n, Q_VEC)
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
    # (BN, DP)
    b_k = load_rows(p_k, o_s, k_s, k_d, m_s, D, DP)
    b_v = load_rows(p_v, o_s, v_s, v_d, m_s, D, DP)
    grad_k = tl.zeros([BN, DP], tl.float32)
    grad_v = tl.zeros([BN, DP], tl.float32)

    num_patches = tl.cdiv(height, R) * tl.cdiv(width, C)
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
        p_taps_h = p_taps
        p_table_h = p_table
        p_dtable_h = p_dtable
        if HAS_BIAS:
            i_bg = i_b * (num_heads // heads_per_group) + i_h // heads_per_group
            p_taps_h += (i_bg * num_tiles + i_tile) * (2 * BN)
            p_table_h = table_of_head(p_table_h, i_h, table_h, row_pitch)
        if BIAS_GRAD:
            i_copy = tl.program_id(0) % num_copies
            p_dtable_h += (i_copy * num_heads + i_h) * (table_h + 4) * (table_w + 4)
        if BIAS_GRAD:
            # Summed over the other dimensions after the loop.
            grad_y = tl.zeros([BN, CW, RW if RW > 0 else R], tl.float32)
            grad_x = tl.zeros([BN, CW, RW if RW > 0 else R], tl.float32)
        for i_patch in range(first_patch, last_patch):
            row0, col0, _, o_m, m_m = patch_queries(i_patch, height, width, 1, R, C)
            # (M, DP)
            p_q_h = p_q + i_b * q_b + i_h * q_h
            b_q = load_rows(p_q_h, o_m, q_n, q_d, m_m, D, DP)
            if SCALE_Q:
                b_q = (b_q * q_factor).to(b_q.dtype)
            p_do_h = p_do + i_b * do_b + i_h * do_h
            b_do = load_rows(p_do_h, o_m, do_n, do_d, m_m, D, DP)
            # (M,)
            lse2 = tl.load(p_lse + o_bh + o_m, mask=m_m, other=float('inf'))
            lse2 *= LOG2E
            delta = tl.load(p_delta + o_bh + o_m, mask=m_m, other=0.0)
            if HAS_BIAS:
                b_ty, b_corner, _, b_u = load_taps(
                    p_taps_h, col0, step_x, table_h, table_w, row_pitch, BN, NW
                )
                bias = bias_product(
                    p_table_h, b_ty, b_corner, b_u, row0, height, table_h, row_pitch,
                    step_y, step_x, 1, R, C, CW, IN_RANGE,
                )  # fmt: skip
                bias = as_patch(bias, R, C, BN, NW).to(tl.float32)
            else:
                bias = tl.zeros([R * C, BN], tl.float32)
            if PART == DP:
                logits = dot(b_q, tl.trans(b_k), bias)
                grad = dot(b_do, tl.trans(b_v))
            else:
                logits = dot_in_parts(
                    p_q_h, q_n, q_d, o_m, m_m, q_factor, p_k, k_s, k_d,
                    o_s, m_s, bias, head_dim, PART,
                )  # fmt: skip
                grad = dot_in_parts(
                    p_do_h, do_n, do_d, o_m, m_m, 1.0, p_v, v_s, v_d,
                    o_s, m_s, tl.zeros([R * C, BN], tl.float32), head_dim, PART,
                )  # fmt: skip
            # Behind the last key exp2(-lse2) would overflow where logits are low: 1 at
            # most is as good as masked, as such a key is too far out for the table.
            # (M, BN)
            exponent = logits * scale_log2 - lse2[:, None]
            weights = tl.exp2(tl.minimum(exponent, 0.0, tl.PropagateNan.ALL))
            dropped = weights
            if DROPOUT:
                keep = keep_scale(
                    seed, dropout_p, (o_bh + o_m)[:, None], o_s[None, :], num_keys
                )
                grad *= keep
                dropped *= keep
            if KEY_GRAD:
                dropped = dropped.to(b_do.dtype)
                grad_v = add_product(dropped, b_do, grad_v, num_keys > 0)
            grad = (weights * (grad - delta[:, None])).to(b_q.dtype)
            if KEY_GRAD:
                grad_k = add_product(grad, b_q, grad_k, num_keys > 0)
            if BIAS_GRAD:
                for_y, for_x = bias_gradient(
                    grad, p_taps_h, p_table_h, p_dtable_h, row0, col0, height,
                    table_h, table_w, row_pitch, step_y, step_x, unit,
                    R, C, CW, RW, BN, NW, IN_RANGE, FIXED,
                )  # fmt: skip
                grad_y += for_y
                grad_x += for_x
        if BIAS_GRAD:
            o_tap = i_tile * BN + key_order(BN, NW)
            m_tap = o_tap < num_keys
            # (splits, B, Hq, S, 2)
            o_dpos = (i_split * (num_bkv // num_kv) + i_b) * num_heads + i_h
            p_dpos_h = p_dpos + (o_dpos * num_keys + o_tap) * 2
            grad_y = tl.sum(tl.sum(grad_y, 2), 1) * slope_y
            grad_x = tl.sum(tl.sum(grad_x, 2), 1) * slope_x
            tl.store(p_dpos_h, grad_y, mask=m_tap)
            tl.store(p_dpos_h + 1, grad_x, mask=m_tap)

    if KEY_GRAD:
        # (splits, B, Hkv, S, D)
        o_row = (i_split.to(tl.int64) * num_bkv + i_bkv) * num_keys + o_s
        store_rows(p_dk, grad_k * scale, o_row, D, m_s, D, DP)
        store_rows(p_dv, grad_v, o_row, D, m_s, D, DP)
