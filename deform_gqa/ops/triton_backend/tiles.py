"""Loads, stores and small pieces that the deform_attn kernels share."""

import triton
import triton.language as tl


@triton.jit
def patch_queries(i_patch, height, width, R: tl.constexpr, C: tl.constexpr):
    """First row and column of a patch; its (M,) queries and which are on the map."""
    per_row = tl.cdiv(width, C)
    row0 = (i_patch // per_row) * R
    col0 = (i_patch % per_row) * C
    m = tl.arange(0, R * C)
    row, col = row0 + m // C, col0 + m % C
    o_m = row.to(tl.int64) * width + col
    return row0, col0, o_m, (row < height) & (col < width)


@triton.jit
def load_rows_of(
    p, o_row, stride_row, stride_d, m_row, D: tl.constexpr, DP: tl.constexpr
):
    """(rows, DP) of a matrix, zero outside."""
    o_d = tl.arange(0, DP)
    p = p + o_row[:, None] * stride_row + o_d[None, :] * stride_d
    mask = m_row[:, None]
    if D != DP:
        mask = mask & (o_d < D)[None, :]
    return tl.load(p, mask=mask, other=0.0)


@triton.jit
def load_columns_of(
    p, o_col, stride_col, stride_d, m_col, D: tl.constexpr, DP: tl.constexpr
):
    """(DP, columns): the transposed matrix, zero outside."""
    o_d = tl.arange(0, DP)
    p = p + o_d[:, None] * stride_d + o_col[None, :] * stride_col
    mask = m_col[None, :]
    if D != DP:
        mask = mask & (o_d < D)[:, None]
    return tl.load(p, mask=mask, other=0.0)


@triton.jit
def store_rows_of(p, x, o_row, stride_row, m_row, D: tl.constexpr, DP: tl.constexpr):
    """Stores (rows, DP) into a matrix whose last stride is 1."""
    o_d = tl.arange(0, DP)
    mask = m_row[:, None]
    if D != DP:
        mask = mask & (o_d < D)[None, :]
    p = p + o_row[:, None] * stride_row + o_d[None, :]
    tl.store(p, x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def keep_scale(seed, dropout_p, o_row, o_key, num_keys):
    """Dropout factor, 0 or 1 / (1 - p), of each (row, key): a function of both."""
    draw = tl.rand(seed, o_row * num_keys + o_key)
    return tl.where(draw >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)
