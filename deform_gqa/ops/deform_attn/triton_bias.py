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

Where a program walks over keys (forward, dq), both operands are made in the registers
in which the lanes of the product hold them (``patch_bias``): the order of k, which is
free, is chosen so that what a lane needs of a table row are neighbors in memory. Only
the bias itself then goes through shared memory, on its way to the product q k^T.

Cost, counted from SASS (``tools/kernel_report.py``; Triton 3.9, sm_90, bfloat16,
D = 32, stage 1 of DAT-T++ on an 800 x 1333 image; executed instructions of the inner
loop a (query, key, head) pair): forward takes 15.5, without a bias 6.8. With operands
that move through shared memory (``bias_product``) it took 17.9, three times the clocks
of shared memory, and 23 barriers a tile in place of 4. Other forms were counted, bias
included, at 103 (four taps loaded a pair) and 70 (a gather along rows blended once).

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
    """Weight of a cell at a signed distance, in the dtype of that."""
    # A plain 0.0 would be float32 in Triton 3.6, and so would be the weight.
    return tl.maximum(1.0 - tl.abs(distance), tl.zeros_like(distance))


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


# 1.5 * 2^23: adding it rounds a float32 below 2^22 to an integer, its lowest bits.
ROUNDER = tl.constexpr(12582912.0)
ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def round_with_bits(x):
    """x rounded to an integer, and that plus ROUNDER_BITS.

    What floor and conversions do, without the units for them, which are few.
    """
    x = x + ROUNDER
    return x - ROUNDER, x.to(tl.int32, bitcast=True)


@triton.jit
def load_windows(
    p_taps, col0, step_x, table_h, table_w, row_pitch, BN: tl.constexpr,
    NW: tl.constexpr, IN_RANGE: tl.constexpr,
):  # fmt: skip
    """As ``load_taps``, with rounding for floor.

    Returns:
        t_y, the corner of each key's window and t_x from half a cell before there, all
        (BN,), in the order of ``key_order``. The corner is off by what
        ``fragment_rows`` adds, where it costs nothing.
    """
    # (BN / NW, NW): the keys of a warp are neighbors, so each lane loads them at once.
    o_s = tl.arange(0, BN // NW)[:, None] + tl.arange(0, NW)[None, :] * (BN // NW)
    b_ty = tl.reshape(tl.load(p_taps + o_s), (BN,))
    b_tx = tl.reshape(tl.load(p_taps + BN + o_s), (BN,)) + (col0 * step_x + 0.5)
    # One column of zeros lies before the table, and keys behind the last one far off.
    start = tl.maximum(b_tx, -0.5)
    if not IN_RANGE:
        start = tl.minimum(start, table_w)
    nearest, bits = round_with_bits(start)
    corner = (bits & 3) * (table_h + PADDING_ROWS) * row_pitch + (bits >> 2)
    return b_ty, corner, b_tx - nearest


@triton.jit
def lane_weights(
    b_u, step, C: tl.constexpr, CW: tl.constexpr, ODD: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """(CW / 8, C / 8, 2, BN, 8, 4) tent weights: every other k of a product's operand.

    k = 16 * i_16 + 8 * i_8 + 2 * lane + ODD; the last two dimensions are its lanes. Of
    fewer than eight columns, these are the last but one.
    """
    C_LANES: tl.constexpr = min(C, 8)
    i_16 = tl.arange(0, CW // 8)[:, None, None, None, None, None]
    c_8 = tl.arange(0, C // C_LANES)[None, :, None, None, None, None]
    i_8 = tl.arange(0, 2)[None, None, :, None, None, None]
    c = tl.arange(0, C_LANES)[None, None, None, None, :, None]
    lane = tl.arange(0, 4)[None, None, None, None, None, :]
    # Four numbers of a lane are for neighbors in the packed table; see fragment_rows.
    cell = i_16 * 8 + lane // 2 * 4 + i_8 * 2 + ODD
    shift = (c_8 * 8 + c).to(tl.float32) * step + (0.5 - cell.to(tl.float32))
    return tent((b_u[None, None, None, :, None, None] + shift).to(DTYPE))


@triton.jit
def fragment_columns(b_u, step, C: tl.constexpr, CW: tl.constexpr, DTYPE: tl.constexpr):
    """(BN, C, 2 * CW) tent weights of the patch's columns, in the order of k.

    They are made in the registers that the product reads. The join is what holds them
    there: Triton would give all before it the layout of what stands after it.
    """
    BN: tl.constexpr = b_u.shape[0]
    cols = tl.join(
        lane_weights(b_u, step, C, CW, 0, DTYPE),
        lane_weights(b_u, step, C, CW, 1, DTYPE),
    )
    # (BN, C / 8, 8, CW / 8, 2, 4, 2)
    cols = tl.permute(cols, (3, 1, 4, 0, 2, 5, 6))
    return tl.reshape(cols, (BN, C, 2 * CW))


@triton.jit
def fragment_rows(
    p_table, b_ty, b_corner, row0, height, table_h, row_pitch, step_y,
    HS: tl.constexpr, R: tl.constexpr, CW: tl.constexpr, IN_RANGE: tl.constexpr,
):  # fmt: skip
    """(BN, 2 * CW, R) weighed table rows, in the order of k.

    Loads have the shape (CW / 8, R / 8, BN, 8, 16): the last two dimensions are the
    lanes of a product's operand with four numbers each, so nothing changes lanes.

    Args:
        b_ty, b_corner: (BN,) of ``load_windows``.
    """
    BN: tl.constexpr = b_ty.shape[0]
    DTYPE: tl.constexpr = p_table.dtype.element_ty
    # (R / 8, 1, 8)
    i_row = row0 + tl.arange(0, R // 8)[:, None, None] * 8
    i_row = i_row + tl.arange(0, 8)[None, None, :]
    row = tl.minimum(i_row // HS, height - 1).to(tl.float32)
    # (R / 8, BN, 8), half a cell further: rounding is floor then
    t = b_ty[None, :, None] + (row * step_y + 0.5)
    if not IN_RANGE:
        t = tl.minimum(tl.maximum(t, -0.5), table_h + 0.5)
    nearest, bits = round_with_bits(t)
    # What turns the bits of t_y and t_x into cells is the same for all keys, and two
    # sums that overflow cancel.
    o_head = i_row % HS * (PHASES * (table_h + PADDING_ROWS)) - ROUNDER_BITS
    o_head = o_head * row_pitch - (ROUNDER_BITS >> 2)
    o_block = b_corner[None, :, None] + bits * row_pitch + o_head
    # A lane loads half a block; the compiler must not know that two halves are aligned.
    m = tl.arange(0, 16)
    o = (o_block + o_block)[None, :, :, :, None] * 4 + m[None, None, None, None, :]
    o = o + (tl.arange(0, CW // 8) * 16)[:, None, None, None, None]
    rows = tl.load(p_table + o)
    # 1 - f for the upper row of a block, f for the lower one.
    sign = tl.where(m // 4 % 2 == 0, -1.0, 1.0)
    weights = 0.5 + (t - nearest)[:, :, :, None] * sign[None, None, None, :]
    rows = rows * weights.to(DTYPE)[None, :, :, :, :]
    rows = tl.reshape(rows, (CW // 8, R // 8, BN, 8, 4, 2, 2))
    rows = tl.permute(rows, (2, 0, 5, 4, 6, 1, 3))
    return tl.reshape(rows, (BN, 2 * CW, R))


@triton.jit
def patch_bias(
    p_table, p_taps, row0, col0, height, table_h, table_w, row_pitch, step_y, step_x,
    HS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    CW: tl.constexpr, NW: tl.constexpr, IN_RANGE: tl.constexpr,
):  # fmt: skip
    """(BN, C, R) bias of the patch in the dtype of the table.

    Operands of 16 bits are made in the registers that hold them in the product. Those
    of 32 bits, which it reads in another order, are moved there.
    """
    DTYPE: tl.constexpr = p_table.dtype.element_ty
    if p_table.dtype.element_ty == tl.float32:
        b_ty, b_corner, _, b_u = load_taps(
            p_taps, col0, step_x, table_h, table_w, row_pitch, BN, NW
        )
        bias = bias_product(
            p_table, b_ty, b_corner, b_u, row0, height, table_h, row_pitch,
            step_y, step_x, HS, R, C, CW, IN_RANGE,
        )  # fmt: skip
    else:
        b_ty, b_corner, b_u = load_windows(
            p_taps, col0, step_x, table_h, table_w, row_pitch, BN, NW, IN_RANGE
        )
        rows = fragment_rows(
            p_table, b_ty, b_corner, row0, height, table_h, row_pitch, step_y,
            HS, R, CW, IN_RANGE,
        )  # fmt: skip
        cols = fragment_columns(b_u, step_x, C, CW, DTYPE)
        bias = dot(cols, rows, out_dtype=DTYPE)
    return bias


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
