"""Loads, stores and small pieces that the deform_attn kernels share."""

import triton
import triton.language as tl

from . import constants

LN2 = tl.constexpr(constants.LN2)
LOG2E = tl.constexpr(constants.LOG2E)


@triton.jit
def patch_queries(
    i_patch, height, width, HS: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Place of a patch of HS stacked heads, whose rows of the map alternate.

    Returns:
        First row of the stack, first column, and (M,) each: the head in the stack,
        the query, and whether that is on the map.
    """
    per_row = tl.cdiv(width, C)
    row0 = (i_patch // per_row) * R
    col0 = (i_patch % per_row) * C
    m = tl.arange(0, R * C)
    i_row, col = row0 + m // C, col0 + m % C
    row = i_row // HS
    o_m = (row * width + col).to(tl.int64)
    return row0, col0, i_row % HS, o_m, (row < height) & (col < width)


@triton.jit
def row_strides(stride_b, stride_h, stride_n, VEC: tl.constexpr):
    """The strides, known to the compiler as the multiples of VEC that they are.

    By itself it sees multiples of 16 alone, and would load the rows of a head
    dimension of 24 or 40 element by element.
    """
    if VEC > 1:
        stride_b = stride_b // VEC * VEC
        stride_h = stride_h // VEC * VEC
        stride_n = stride_n // VEC * VEC
    return stride_b, stride_h, stride_n


@triton.jit
def query_offsets(i_in_stack, o_m, stride_head, stride_query):
    """(M,) offsets of the queries of stacked heads."""
    return i_in_stack.to(tl.int64) * stride_head + o_m.to(tl.int64) * stride_query


@triton.jit
def load_rows(p, o_row, stride_row, stride_d, m_row, D: tl.constexpr, DP: tl.constexpr):
    """(rows, DP) of a matrix, zero outside."""
    o_d = tl.arange(0, DP)
    p = p + o_row[:, None] * stride_row + o_d.to(tl.int64)[None, :] * stride_d
    mask = m_row[:, None]
    if D != DP:
        mask = mask & (o_d < D)[None, :]
    return tl.load(p, mask=mask, other=0.0)


@triton.jit
def load_columns(
    p, o_col, stride_col, stride_d, m_col, D: tl.constexpr, DP: tl.constexpr
):
    """(DP, columns): the transposed matrix, zero outside."""
    o_d = tl.arange(0, DP)
    p = p + o_d.to(tl.int64)[:, None] * stride_d + o_col[None, :] * stride_col
    mask = m_col[None, :]
    if D != DP:
        mask = mask & (o_d < D)[:, None]
    return tl.load(p, mask=mask, other=0.0)


@triton.jit
def store_rows(p, x, o_row, stride_row, m_row, D: tl.constexpr, DP: tl.constexpr):
    """Stores (rows, DP) into a matrix whose last stride is 1."""
    o_d = tl.arange(0, DP)
    mask = m_row[:, None]
    if D != DP:
        mask = mask & (o_d < D)[None, :]
    p = p + o_row[:, None] * stride_row + o_d[None, :]
    tl.store(p, x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def split_tf32(x):
    """float32 -> its value rounded to TF32 and the rest, which TF32 holds to 2^-22."""
    bits = x.to(tl.int32, bitcast=True) + 0x1000
    high = (bits & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def dot(a, b, acc=None, out_dtype: tl.constexpr = tl.float32):
    """acc + a b; of float32 as three TF32 products, about as exact as float32.

    ``input_precision='tf32x3'`` is the same, but spends ten instructions an element
    on splitting it, in every warp that reads it, for which this takes three.
    """
    if a.dtype == tl.float32:
        a_high, a_low = split_tf32(a)
        b_high, b_low = split_tf32(b)
        acc = tl.dot(a_low, b_high, acc, input_precision='tf32')
        acc = tl.dot(a_high, b_low, acc, input_precision='tf32')
        acc = tl.dot(a_high, b_high, acc, input_precision='tf32')
    else:
        acc = tl.dot(a, b, acc, out_dtype=out_dtype)
    return acc


@triton.jit
def dot_in_parts(
    p_a, stride_a, stride_ad, o_a, m_a, factor, p_b, stride_b, stride_bd, o_b, m_b,
    acc, head_dim, PART: tl.constexpr,
):  # fmt: skip
    """acc + factor * a b^T, of two (rows, D) in memory, PART columns at a time.

    For head dimensions of which a whole tile would not fit into the registers; these
    are no constant here, or the loop would be unrolled and that be lost again.
    """
    o_d = tl.arange(0, PART).to(tl.int64)
    p_a = p_a + o_a[:, None] * stride_a + o_d[None, :] * stride_ad
    p_b = p_b + o_b[:, None] * stride_b + o_d[None, :] * stride_bd
    for d0 in range(0, head_dim, PART):
        m_d = (o_d < head_dim - d0)[None, :]
        b_a = tl.load(p_a + d0 * stride_ad, mask=m_a[:, None] & m_d, other=0.0)
        b_b = tl.load(p_b + d0 * stride_bd, mask=m_b[:, None] & m_d, other=0.0)
        acc = dot((b_a * factor).to(b_a.dtype), tl.trans(b_b), acc)
    return acc


@triton.jit
def keep_scale(seed, dropout_p, o_row, o_key, num_keys):
    """Dropout factor, 0 or 1 / (1 - p), of each (row, key): a function of both."""
    draw = tl.rand(seed, o_row * num_keys + o_key, 7)
    return tl.where(draw >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)
