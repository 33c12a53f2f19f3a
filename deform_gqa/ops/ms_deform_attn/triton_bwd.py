"""The backward kernel of ms_deform_attn: all gradients in one pass over the samples.

The channels are two halves, BH of them each. A lane then has four of a half, whose
gradients are one 16-byte atomic where there are such (from sm_90 on), and which its
neighbours continue: no lane hands numbers to another before the atomics.
"""

import triton
import triton.language as tl

from .triton_samples import (
    load_pixels,
    pixel_rows,
    sample_position,
    sample_weight,
    softmax_of_samples,
)


@triton.jit
def add_pixels(p, term, mask, unit, FIXED: tl.constexpr):
    """Adds (BQ, BH) to rows of the gradient of value."""
    if FIXED:
        tl.atomic_add(p, (term * unit).to(tl.int64), mask=mask, sem='relaxed')
    else:
        tl.atomic_add(p, term, mask=mask, sem='relaxed')


@triton.jit(do_not_specialize=['num_keys', 'num_queries'])
def ms_deform_attn_bwd_kernel(
    p_grad, p_out, p_value, p_shapes, p_starts, p_locations, p_weights,
    p_dvalue, p_dlocations, p_dweights, p_unit,
    value_b, value_s, value_h, num_keys, num_queries,
    HEADS: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
    POINTS: tl.constexpr, D: tl.constexpr, LOGITS: tl.constexpr, FIXED: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    SAMPLES: tl.constexpr = LEVELS * POINTS
    KV_HEADS: tl.constexpr = HEADS // GROUP
    num_tiles = tl.cdiv(num_queries, BQ)
    i_q, i_bh = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    i_b, i_h = (i_bh // HEADS).to(tl.int64), i_bh % HEADS
    i_kv = (i_h // GROUP).to(tl.int64)
    o_q = i_q * BQ + tl.arange(0, BQ)
    m_q = o_q < num_queries
    BH: tl.constexpr = BD // 2
    o_d = tl.arange(0, BH)
    m_low, m_high = o_d < D, o_d + BH < D
    # (B, Q, M): row of a query's head
    o_row = (i_b * num_queries + o_q) * HEADS + i_h
    p_value += i_b * value_b + i_kv * value_h
    # The gradient of value is contiguous: (B, S, Mv, D)
    p_dvalue += (i_b * num_keys * KV_HEADS + i_kv) * D
    p_weights += o_row * SAMPLES
    p_locations += o_row * (SAMPLES * 2)
    p_dweights += o_row * SAMPLES
    p_dlocations += o_row * (SAMPLES * 2)
    # (BQ, BH), of each half
    o_qd = o_row[:, None] * D + o_d[None, :]
    m_q_low = m_q[:, None] & m_low[None, :]
    m_q_high = m_q[:, None] & m_high[None, :]
    b_grad_low = tl.load(p_grad + o_qd, mask=m_q_low, other=0.0).to(tl.float32)
    b_grad_high = tl.load(p_grad + BH + o_qd, mask=m_q_high, other=0.0).to(tl.float32)
    peak = tl.zeros([BQ], tl.float32)
    total, row_sum = peak, peak
    if LOGITS:
        peak, total = softmax_of_samples(p_weights, m_q, SAMPLES, BE)
        # The sum of weights times their gradients, as in the backward of softmax
        b_out = tl.load(p_out + o_qd, mask=m_q_low, other=0.0).to(tl.float32)
        row_sum = tl.sum(b_out * b_grad_low, 1)
        b_out = tl.load(p_out + BH + o_qd, mask=m_q_high, other=0.0).to(tl.float32)
        row_sum += tl.sum(b_out * b_grad_high, 1)
    unit = 1.0
    if FIXED:
        unit = tl.load(p_unit)
    for i_l in range(LEVELS):
        height = tl.load(p_shapes + i_l * 2).to(tl.int32)
        width = tl.load(p_shapes + i_l * 2 + 1).to(tl.int32)
        start = tl.load(p_starts + i_l).to(tl.int32)
        for i_p in range(POINTS):
            i_e = i_l * POINTS + i_p
            x, y, f_x, f_y = sample_position(p_locations + i_e * 2, m_q, height, width)
            weight = sample_weight(p_weights + i_e, m_q, peak, total, LOGITS)
            d_weight = tl.zeros([BQ], tl.float32)
            d_x = d_weight
            d_y = d_weight
            for i_c in tl.static_range(4):
                o_pixel, inside = pixel_rows(
                    x + i_c % 2, y + i_c // 2, start, height, width, 1
                )
                o_value = o_pixel * value_s
                b_low = load_pixels(p_value, o_value, inside, o_d, m_low)
                b_high = load_pixels(p_value + BH, o_value, inside, o_d, m_high)
                product = tl.sum(b_grad_low * b_low + b_grad_high * b_high, 1)
                along_x = f_x if i_c % 2 else 1.0 - f_x
                along_y = f_y if i_c // 2 else 1.0 - f_y
                d_weight += product * along_x * along_y
                d_x += product * along_y * (1.0 if i_c % 2 else -1.0)
                d_y += product * along_x * (1.0 if i_c // 2 else -1.0)
                factor = weight * along_x * along_y
                p = p_dvalue + (o_pixel * (KV_HEADS * D))[:, None] + o_d[None, :]
                added = (inside & m_q)[:, None]
                m_add = added & m_low[None, :]
                add_pixels(p, factor[:, None] * b_grad_low, m_add, unit, FIXED)
                m_add = added & m_high[None, :]
                add_pixels(p + BH, factor[:, None] * b_grad_high, m_add, unit, FIXED)
            if LOGITS:
                d_weight = weight * (d_weight - row_sum)
            p = p_dweights + i_e
            tl.store(p, d_weight.to(p.dtype.element_ty), mask=m_q)
            tl.store(p_dlocations + i_e * 2, d_x * weight * width, mask=m_q)
            tl.store(p_dlocations + i_e * 2 + 1, d_y * weight * height, mask=m_q)
