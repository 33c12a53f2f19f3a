"""The position bias of a (queries, keys) tile as two small batched products.

Kernel notation, beside that of ``ops/__init__.py``::

    R, C   rows and columns of the patch of queries that a program works on
    HS     query heads whose rows alternate, of one kv head and offset group
    M      R * C queries, row-major      BN     keys of a tile
    CW     table columns that the patch can reach from one key (a power of two)
    t      a coordinate in table cells; start = floor(t of the patch's first query)

For one key the bias of the patch is bilinear, hence a product of three matrices::

    bias[r, c] = sum_k  rows[r, k] * cols[c, k]
    rows[r, k] = (1 - fy or fy) * table[y0 + (0 or 1), start + w]     k = (w, 0 or 1)
    cols[c, k] = max(0, 1 - |t_x(c) - start - w|)                     tent weights

so tensor cores interpolate: the weights ``cols`` are shared by the R rows and the
gathered ``rows`` by the C columns, and nothing is looked up per pair. Stacked heads
are further rows, each of its own table: what is computed from a position serves all.

Cost, counted from SASS (Triton 3.9, sm_90, bfloat16, D = 32, patches of 16 x 16, steps
of a detection map; instructions of the inner loop a lane and (query, key, head) pair,
by ``tools/kernel_report.py``): the forward kernel takes 19, the same loop without a
bias 9. So the bias costs 10: about 2.5 for the column weights, 2.5 for gathering and
blending rows, 3 for the product and for moving it into the accumulator of q k^T, the
rest for coordinates. Other forms were counted, bias included, at 103 (four taps loaded
a pair) and 70 (a gather along rows blended once).

With 16-bit inputs weights, rows and bias are float16 (11 bits), which loses less than
the rounding of a materialised bias to bfloat16, and no more than one to float16.
"""

import triton
import triton.language as tl

from ..common.triton_tiles import dot
from .triton_pack_table import ENTRIES, PADDING_ROWS, PHASES


@triton.jit
def table_cell(t, table_size):
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
def load_table_rows(p_table, b_corner, o_row, CW: tl.constexpr):
    """(BN, n, 2 * CW) packed table rows from each key's corner.

    Args:
        o_row: (BN, n) offsets, in blocks, of the upper row of each pair.
    """
    o_block = (b_corner[:, None] + o_row) * ENTRIES
    # (BN, n, 2 * CW)
    p = p_table + (o_block[:, :, None] + tl.arange(0, 2 * CW)[None, None, :])
    return tl.load(p)


@triton.jit
def load_rises(p_table, b_corner, row, row_pitch, table_h, CW: tl.constexpr):
    """(BN, CW, n) rises of the table downwards and rightwards from its cells.

    Args:
        b_corner: (BN,) of ``load_taps``; the first of the CW columns.
        row: (BN, n), rows of the table; zeros lie below it.
    """
    p = p_table + ((b_corner[:, None] + row * row_pitch) * 8)[:, None, :]
    w = tl.arange(0, CW)
    o_w = (w // 4 * 8 + w % 4)[None, :, None]
    o_next = ((w + 1) // 4 * 8 + (w + 1) % 4)[None, :, None]
    mask = (row <= table_h)[:, None, :]
    cells = tl.load(p + o_w, mask=mask, other=0.0).to(tl.float32)
    below = tl.load(p + o_w + 4, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(p + o_next, mask=mask, other=0.0).to(tl.float32)
    return below - cells, right - cells


@triton.jit
def blend_rows(b_cells, fraction, CW: tl.constexpr):
    """Weighs the packed rows (BN, R, 2 * CW); their sum is left to the product."""
    is_lower = (tl.arange(0, 2 * CW) // 4) % 2 == 0
    lower = (1.0 - fraction).to(b_cells.dtype)[:, :, None]
    upper = fraction.to(b_cells.dtype)[:, :, None]
    return b_cells * tl.where(is_lower[None, None, :], lower, upper)


@triton.jit
def query_rows(row0, height, HS: tl.constexpr, R: tl.constexpr):
    """(R,) rows of the map; below it they must not leave the table."""
    return tl.minimum((row0 + tl.arange(0, R)) // HS, height - 1).to(tl.float32)


@triton.jit
def load_taps(
    p_taps, col0, step_x, table_h, table_w, row_pitch, BN: tl.constexpr,
    NW: tl.constexpr,
):  # fmt: skip
    """t_y at map row 0, the corner of each key's window, its column and t_x from there.

    Args:
        p_taps: The tile's (2, BN) of ``key_taps.py``.

    Returns:
        All (BN,), in the order of ``key_order``.
    """
    # (BN / NW, NW): the keys of a warp are neighbors, so each lane loads them at once.
    o_s = tl.arange(0, BN // NW)[:, None] + tl.arange(0, NW)[None, :] * (BN // NW)
    b_ty = tl.reshape(tl.load(p_taps + o_s), (BN,))
    b_tx = tl.reshape(tl.load(p_taps + BN + o_s), (BN,))
    start, b_u = table_cell(b_tx + col0 * step_x, table_w)
    # One column and one row of zeros lie before the table.
    start += 1
    corner = ((start & 3) * (table_h + PADDING_ROWS) + 1) * row_pitch + (start >> 2)
    return b_ty, corner, start, b_u


@triton.jit
def bias_product(
    p_table, b_ty, b_corner, b_u, row0, height, table_h, row_pitch, step_y, step_x,
    HS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CW: tl.constexpr,
    IN_RANGE: tl.constexpr,
):  # fmt: skip
    """(BN, C, R) bias of the patch in the dtype of the table."""
    DTYPE: tl.constexpr = p_table.dtype.element_ty
    t = b_ty[:, None] + query_rows(row0, height, HS, R)[None, :] * step_y
    cell, fraction, _ = row_taps(t, table_h, IN_RANGE)
    o_table = (row0 + tl.arange(0, R)) % HS * (PHASES * (table_h + PADDING_ROWS))
    rows = load_table_rows(p_table, b_corner, (o_table[None, :] + cell) * row_pitch, CW)
    rows = blend_rows(rows, fraction, CW)
    cols = both_rows(column_weights(b_u, step_x, C, CW, DTYPE), CW)
    return dot(cols, tl.permute(rows, (0, 2, 1)), out_dtype=DTYPE)


@triton.jit
def as_patch(x, R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, NW: tl.constexpr):
    """(BN, C, R), keys in the order of key_order -> (M, BN), keys in order."""
    x = tl.reshape(x, (BN // NW, NW, C, R))
    return tl.reshape(tl.permute(x, (3, 2, 1, 0)), (R * C, BN))


@triton.jit
def as_keys(x, R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, NW: tl.constexpr):
    """(M, BN), keys in order -> (BN, C, R), keys in the order of key_order."""
    x = tl.reshape(x, (R, C, NW, BN // NW))
    return tl.reshape(tl.permute(x, (3, 2, 1, 0)), (BN, C, R))


@triton.jit
def weights_and_cells(
    t, cell, COUNT: tl.constexpr, DTYPE: tl.constexpr, PEAK: tl.constexpr
):
    """(BN, 2, COUNT, n): tent weights of coordinates t over cells, and 1 at their own.

    The bias moves with t by the rise of the table from the latter to the next cell.

    Args:
        t, cell: (BN, n), counted from the first of the COUNT cells.
        PEAK: Power of two that all is multiplied by.
    """
    cells = tl.arange(0, COUNT).to(tl.float32)[None, :, None]
    distance = tl.abs(t[:, None, :] - cells)
    weights = tl.maximum(PEAK - distance * PEAK, 0.0).to(DTYPE)
    is_cell = tl.where(cell[:, None, :] == cells, PEAK, 0.0).to(DTYPE)
    return tl.permute(tl.join(weights, is_cell), (0, 3, 1, 2))


@triton.jit
def contract_columns(grad, b_u, step, CW: tl.constexpr, PEAK: tl.constexpr):
    """Sums the bias gradient (BN, C, R) over columns into table columns.

    Returns:
        (BN, 2 * CW, R), times PEAK: CW sums with the tent weights, the gradient of the
        blended rows, and CW over the columns in each cell, for the gradient of t_x.
    """
    BN: tl.constexpr = grad.shape[0]
    C: tl.constexpr = grad.shape[1]
    t = b_u[:, None] + tl.arange(0, C).to(tl.float32)[None, :] * step
    by = weights_and_cells(t, tl.floor(t), CW, grad.dtype, PEAK)
    by = tl.reshape(by, (BN, 2 * CW, C))
    if C == 1:
        sums = by.to(tl.float32) * grad.to(tl.float32)
    else:
        sums = dot(by, grad)
    return sums


@triton.jit
def contract_rows(sums, t, cell, RW: tl.constexpr, PEAK: tl.constexpr):
    """Sums what contract_columns returns, (BN, 2 * CW, R), over rows into table rows.

    Args:
        t, cell: (BN, R), t_y and its cell, counted from the window's first row; a cell
            outside the window if t_y does not move with the position.
        PEAK: Of the weights, the inverse of that of the sums.

    Returns:
        The gradient of the table's cells, and what gives the gradients of t_y and t_x
        when multiplied with the rise to the next cell, each (BN, CW, RW).
    """
    BN: tl.constexpr = sums.shape[0]
    CW: tl.constexpr = sums.shape[1] // 2
    R: tl.constexpr = sums.shape[2]
    by = weights_and_cells(t, cell, RW, sums.dtype, PEAK)
    by = tl.reshape(by, (BN, 2 * RW, R))
    x = dot(sums, tl.permute(by, (0, 2, 1)))
    x = tl.permute(tl.reshape(x, (BN, 2, CW, 2, RW)), (0, 2, 4, 3, 1))
    by_weight, by_cell = tl.split(x)
    grad, grad_y = tl.split(by_weight)
    grad_x, _ = tl.split(by_cell)
    return grad, grad_y, grad_x
