"""The position bias of a (queries, keys) tile as two small batched products.

Kernel notation, beside that of ``ops/naive.py``::

    R, C   rows and columns of the patch of queries that a program works on
    M      R * C queries, row-major          BN     keys of a tile
    CW     table columns that the patch can reach from one key (a power of two)
    t      a coordinate in table cells; start = floor(t of the patch's first query)

For one key the bias of the patch is bilinear, hence a product of three matrices::

    bias[r, c] = sum_k  rows[r, k] * cols[c, k]
    rows[r, k] = (1 - fy or fy) * table[y0 + (0 or 1), start + w]     k = (w, 0 or 1)
    cols[c, k] = max(0, 1 - |t_x(c) - start - w|)                     tent weights

so tensor cores interpolate: the weights ``cols`` are shared by the R rows and the
gathered ``rows`` by the C columns, and nothing is looked up per pair.

Cost, counted from SASS (Triton 3.9, sm_90, bfloat16, D = 32, patches of 16 x 16, steps
of a detection map; instructions of the inner loop a lane and (query, key, head) pair,
by ``tools/kernel_report.py``): the forward kernel takes 20, the same loop without a
bias 9. So the bias costs 11: about 2.5 for the column weights, 2.5 for gathering and
blending rows, 3 for the product and for moving it into the accumulator of q k^T, the
rest for coordinates. Other forms were counted, bias included, at 103 (four taps loaded
a pair) and 70 (a gather along rows blended once).

With 16-bit inputs weights, rows and bias are float16 (11 bits), which loses less than
the rounding of a materialised bias to bfloat16, and no more than one to float16.
"""

import triton
import triton.language as tl


@triton.jit
def window_start(t, table_size):
    """First cell of the window and what is left of t; cells before -1 hold zeros."""
    start = tl.minimum(tl.maximum(tl.floor(t), -1.0), table_size)
    return start.to(tl.int32), t - start


@triton.jit
def row_taps(t, table_size, IN_RANGE: tl.constexpr):
    """Upper cell, the lower one's weight, and whether t moves with the position."""
    if IN_RANGE:
        inside = t > -1.0
    else:
        inside = (t > -1.0) & (t < table_size)
        t = tl.minimum(tl.maximum(t, -1.0), table_size)
    cell = tl.floor(t)
    return cell.to(tl.int32), t - cell, inside


@triton.jit
def tent(distance):
    """Weight of a cell at a signed distance."""
    return tl.maximum(1.0 - tl.abs(distance), 0.0)


@triton.jit
def quad_cells(
    b_u,
    step,
    C: tl.constexpr,
    CW: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """(BN, C, CW / 4) distance of each column from the cells 4 * i + OFFSET."""
    c = tl.arange(0, C).to(tl.float32)
    cells = tl.arange(0, CW // 4) * 4 + OFFSET
    shift = c[:, None] * step - cells[None, :].to(tl.float32)
    return b_u[:, None, None] + shift[None, :, :]


@triton.jit
def interleave4(x0, x1, x2, x3):
    """Four (BN, C, n) -> (BN, C, n, 4), the four values side by side in a lane."""
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(x, (x0.shape[0], x0.shape[1], x0.shape[2], 4))


@triton.jit
def column_weights(b_u, step, C: tl.constexpr, CW: tl.constexpr, DTYPE: tl.constexpr):
    """(BN, C, CW / 4, 4) tent weights of the patch's columns over the window."""
    return interleave4(
        tent(quad_cells(b_u, step, C, CW, 0)).to(DTYPE),
        tent(quad_cells(b_u, step, C, CW, 1)).to(DTYPE),
        tent(quad_cells(b_u, step, C, CW, 2)).to(DTYPE),
        tent(quad_cells(b_u, step, C, CW, 3)).to(DTYPE),
    )


@triton.jit
def both_rows(x, CW: tl.constexpr):
    """(BN, C, CW / 4, 4) -> (BN, C, 2 * CW): once for each of the two table rows."""
    x = tl.join(x, x)
    x = tl.permute(x, (0, 1, 2, 4, 3))
    return tl.reshape(x, (x.shape[0], x.shape[1], 2 * CW))


@triton.jit
def load_rows(
    p_table, b_corner, cell, row_pitch, CW: tl.constexpr, AGAIN: tl.constexpr
):
    """(BN, R, 2 * CW) packed table rows cell and cell + 1 from each key's corner."""
    o_block = (b_corner[:, None] + cell * row_pitch) * 8
    # (BN, R, 2 * CW)
    p = p_table + (o_block[:, :, None] + tl.arange(0, 2 * CW)[None, None, :])
    return tl.load(p, volatile=AGAIN)


@triton.jit
def blend_rows(b_cells, fraction, CW: tl.constexpr):
    """Weighs the packed rows (BN, R, 2 * CW); their sum is left to the product."""
    is_lower = (tl.arange(0, 2 * CW) // 4) % 2 == 0
    lower = (1.0 - fraction).to(b_cells.dtype)[:, :, None]
    upper = fraction.to(b_cells.dtype)[:, :, None]
    return b_cells * tl.where(is_lower[None, None, :], lower, upper)


@triton.jit
def query_rows(first, R: tl.constexpr, height):
    """Rows of the patch; those below the map must not read outside the table."""
    return tl.minimum(first + tl.arange(0, R), height - 1).to(tl.float32)


@triton.jit
def load_taps(
    p_taps, col0, step_x, table_h, table_w, row_pitch, BN: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """t_y at map row 0, the corner of each key's window, its column and t_x from there.

    Args:
        p_taps: The tile's (2, BN) of ``key_taps.py``.
    """
    o_s = tl.arange(0, BN)
    # (BN,)
    b_ty = tl.load(p_taps + o_s, volatile=AGAIN)
    b_tx = tl.load(p_taps + BN + o_s, volatile=AGAIN)
    start, b_u = window_start(b_tx + col0 * step_x, table_w)
    # One column and one row of zeros lie before the table.
    start += 1
    corner = ((start & 3) * (table_h + 3) + 1) * row_pitch + (start >> 2)
    return b_ty, corner, start, b_u


@triton.jit
def bias_product(
    p_table, b_ty, b_corner, b_u, row0, height, table_h, row_pitch, step_y, step_x,
    R: tl.constexpr, C: tl.constexpr, CW: tl.constexpr, IN_RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BN, C, R) bias of the patch in the dtype of the table."""
    DTYPE: tl.constexpr = p_table.dtype.element_ty
    t = b_ty[:, None] + query_rows(row0, R, height)[None, :] * step_y
    cell, fraction, _ = row_taps(t, table_h, IN_RANGE)
    rows = load_rows(p_table, b_corner, cell, row_pitch, CW, False)
    rows = blend_rows(rows, fraction, CW)
    cols = both_rows(column_weights(b_u, step_x, C, CW, DTYPE), CW)
    return tl.dot(
        cols, tl.permute(rows, (0, 2, 1)), out_dtype=DTYPE, input_precision=PRECISION
    )


@triton.jit
def as_patch(x, R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, NW: tl.constexpr):
    """(BN, C, R), keys in the order of key_order -> (M, BN), keys in order."""
    x = tl.reshape(x, (BN // NW, NW, C, R))
    return tl.reshape(tl.permute(x, (3, 2, 1, 0)), (R * C, BN))


@triton.jit
def as_keys(x, R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, NW: tl.constexpr):
    """(M, BN), keys in order -> (BN, R, C), keys in the order of key_order."""
    x = tl.reshape(x, (R, C, NW, BN // NW))
    return tl.reshape(tl.permute(x, (3, 2, 0, 1)), (BN, R, C))


@triton.jit
def slope(distance):
    """Derivative of the tent by t, from the right where t is on a cell."""
    # Steps up at -1, down twice at 0 and up at 1: sums cost less than selections.
    rise = tl.where(distance >= -1.0, 1.0, 0.0) + tl.where(distance >= 1.0, 1.0, 0.0)
    return rise - tl.where(distance >= 0.0, 2.0, 0.0)


@triton.jit
def column_slopes(b_u, step, C: tl.constexpr, CW: tl.constexpr, DTYPE: tl.constexpr):
    """(BN, C, CW / 4, 4) derivatives of the column weights by t_x."""
    return interleave4(
        slope(quad_cells(b_u, step, C, CW, 0)).to(DTYPE),
        slope(quad_cells(b_u, step, C, CW, 1)).to(DTYPE),
        slope(quad_cells(b_u, step, C, CW, 2)).to(DTYPE),
        slope(quad_cells(b_u, step, C, CW, 3)).to(DTYPE),
    )


@triton.jit
def split_rows(b_cells, R: tl.constexpr, CW: tl.constexpr):
    """Packed rows (BN, R, 2 * CW) -> the lower and the upper row, each (BN, R, CW)."""
    BN: tl.constexpr = b_cells.shape[0]
    cells = tl.reshape(b_cells, (BN, R, CW // 4, 2, 4))
    lower, upper = tl.split(tl.permute(cells, (0, 1, 2, 4, 3)))
    return tl.reshape(lower, (BN, R, CW)), tl.reshape(upper, (BN, R, CW))


@triton.jit
def contract_columns(grad, b_u, step, C: tl.constexpr, CW: tl.constexpr, PRECISION):
    """Sums the bias gradient (BN, R, C) over columns into table columns.

    Returns:
        (BN, R, CW) sums with the tent weights: the gradient of the blended rows, and
        (BN, R, CW) sums with their slopes, for the gradient of t_x.
    """
    BN: tl.constexpr = grad.shape[0]
    R: tl.constexpr = grad.shape[1]
    weights = column_weights(b_u, step, C, CW, grad.dtype)
    slopes = column_slopes(b_u, step, C, CW, grad.dtype)
    if C == 1:
        by_weight = grad.to(tl.float32) * tl.reshape(weights, (BN, 1, CW))
        by_slope = grad.to(tl.float32) * tl.reshape(slopes, (BN, 1, CW))
    else:
        both = tl.join(
            tl.reshape(weights, (BN, C, CW)), tl.reshape(slopes, (BN, C, CW))
        )
        both = tl.reshape(tl.permute(both, (0, 1, 3, 2)), (BN, C, 2 * CW))
        sums = tl.dot(grad, both, input_precision=PRECISION)
        sums = tl.permute(tl.reshape(sums, (BN, R, 2, CW)), (0, 1, 3, 2))
        by_weight, by_slope = tl.split(sums)
    return by_weight, by_slope
