"""What the kernels of ms_deform_attn share: where a sample lies, and its four pixels.

Notation: a program has BQ queries of one head and all D channels, padded to BD; lanes
lie along the channels, so that they load whole rows by 16 bytes.
"""

import triton
import triton.language as tl


@triton.jit
def sample_position(p_location, m_q, height, width):
    """Upper left pixel (BQ,) of a sample of each query, and the position within it."""
    # (BQ,)
    b_x = tl.load(p_location, mask=m_q, other=-2.0)
    b_y = tl.load(p_location + 1, mask=m_q, other=-2.0)
    t_x, t_y = b_x * width - 0.5, b_y * height - 0.5
    # Far outside is as good as outside, and safe to convert; so is what is no number.
    t_x = tl.where((t_x > -2.0) & (t_x < width), t_x, -2.0)
    t_y = tl.where((t_y > -2.0) & (t_y < height), t_y, -2.0)
    x, y = tl.floor(t_x), tl.floor(t_y)
    return x.to(tl.int32), y.to(tl.int32), t_x - x, t_y - y


@triton.jit
def pixel_rows(x, y, start, height, width, stride):
    """Offset (BQ,) of a pixel's channels, and whether the pixel is on the map."""
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return (start + y * width + x).to(tl.int64) * stride, inside


@triton.jit
def load_pixels(p_value, o_row, inside, o_d, m_d):
    """(BQ, BD) in float32, zero outside of the map."""
    p = p_value + o_row[:, None] + o_d[None, :]
    mask = inside[:, None] & m_d[None, :]
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def softmax_of_samples(p_weights, m_q, SAMPLES: tl.constexpr, BE: tl.constexpr):
    """Largest logit and sum of exps (BQ,) over the samples of each query."""
    o_e = tl.arange(0, BE)
    mask = m_q[:, None] & (o_e < SAMPLES)[None, :]
    b_logit = tl.load(p_weights[:, None] + o_e[None, :], mask=mask, other=-float('inf'))
    b_logit = tl.where(m_q[:, None], b_logit.to(tl.float32), 0.0)
    peak = tl.max(b_logit, 1)
    return peak, tl.sum(tl.exp(b_logit - peak[:, None]), 1)


@triton.jit
def sample_weight(p_weight, m_q, peak, total, LOGITS: tl.constexpr):
    """(BQ,) weight of a sample, normalised."""
    b_weight = tl.load(p_weight, mask=m_q, other=0.0).to(tl.float32)
    if LOGITS:
        b_weight = tl.exp(b_weight - peak) / total
    return b_weight
