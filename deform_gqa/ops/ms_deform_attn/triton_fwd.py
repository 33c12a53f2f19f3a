"""The forward kernel of ms_deform_attn."""

import triton
import triton.language as tl

from .triton_samples import (
    load_pixels,
    pixel_rows,
    sample_position,
    sample_weight,
    softmax_of_samples,
)


# Not specialised: what changes with the image and aligns no load.
@triton.jit(do_not_specialize=['num_queries'])
def ms_deform_attn_fwd_kernel(
    p_value, p_shapes, p_starts, p_locations, p_weights, p_out,
    value_b, value_s, value_h, num_queries,
    HEADS: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
    POINTS: tl.constexpr, D: tl.constexpr, LOGITS: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    SAMPLES: tl.constexpr = LEVELS * POINTS
    # All in x: the other dimensions of a grid end at 65535. Heads are the slowest, so
    # that the maps of few of them are in cache.
    num_tiles = tl.cdiv(num_queries, BQ)
    i_q, i_bh = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    i_b, i_h = (i_bh // HEADS).to(tl.int64), i_bh % HEADS
    o_q = i_q * BQ + tl.arange(0, BQ)
    m_q = o_q < num_queries
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    # (B, Q, M): row of a query's head
    o_row = (i_b * num_queries + o_q) * HEADS + i_h
    p_value += i_b * value_b + (i_h // GROUP).to(tl.int64) * value_h
    p_weights += o_row * SAMPLES
    p_locations += o_row * (SAMPLES * 2)
    peak = tl.zeros([BQ], tl.float32)
    total = peak
    if LOGITS:
        peak, total = softmax_of_samples(p_weights, m_q, SAMPLES, BE)
    # (BQ, BD)
    b_out = tl.zeros([BQ, BD], tl.float32)
    for i_l in range(LEVELS):
        height = tl.load(p_shapes + i_l * 2).to(tl.int32)
        width = tl.load(p_shapes + i_l * 2 + 1).to(tl.int32)
        start = tl.load(p_starts + i_l).to(tl.int32)
        for i_p in range(POINTS):
            i_e = i_l * POINTS + i_p
            x, y, f_x, f_y = sample_position(p_locations + i_e * 2, m_q, height, width)
            weight = sample_weight(p_weights + i_e, m_q, peak, total, LOGITS)
            below = weight * f_y
            above = weight - below
            for i_c in tl.static_range(4):
                o_pixel, inside = pixel_rows(
                    x + i_c % 2, y + i_c // 2, start, height, width, value_s
                )
                factor = (below if i_c // 2 else above) * (
                    f_x if i_c % 2 else 1.0 - f_x
                )
                b_out += factor[:, None] * load_pixels(
                    p_value, o_pixel, inside, o_d, m_d
                )
    p_out += o_row[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])
