"""Places, windows and biases that the neighborhood_attn kernels share.

Kernel notation, beside that of ``ops/__init__.py``::

    sub-map  the places of one phase (y % dilation, x % dilation): each is a map of its
             own without dilation, and all rows and columns below count in it
    R, C     rows and columns of the patch of places that a program owns; M = R * C
    WR, WC   rows and columns of a tile that it walks over; BN = WR * WC
    jx       walked tiles begin at column col0 + jx * WC - K // 2; jx is 0 unless
             windows are clamped, then -1 to 1
    border   whether windows of the patch are clamped, or reach places off the map

Patches own queries and walk over keys in forward and for dq; they own keys and walk
over queries for dk and dv. A pair's bias and, away from borders, also whether the
window holds it, depends on (walked - owned) alone: ``triton_table.py`` has both
for all pairs of a patch and a row of tiles, so that a tile of biases, -inf for hidden
pairs, is one aligned load of loop-invariant shape and is what the accumulator of q k^T
begins with. Only patches at borders compare places with windows.
"""

import triton
import triton.language as tl


@triton.jit
def locate_patch(i_patch, height, width, dilation, R: tl.constexpr, C: tl.constexpr):
    """Where patch ``i_patch`` is.

    Returns:
        Place at (0, 0) of the sub-map, its size, first row and column of the patch.
        Patches are counted as if all sub-maps were as large as the first.
    """
    per_row = tl.cdiv(tl.cdiv(width, dilation), C)
    per_map = per_row * tl.cdiv(tl.cdiv(height, dilation), R)
    phase = i_patch // per_map
    phase_y, phase_x = phase // dilation, phase % dilation
    origin = phase_y.to(tl.int64) * width + phase_x
    rows = tl.cdiv(height - phase_y, dilation)
    cols = tl.cdiv(width - phase_x, dilation)
    i_patch = i_patch % per_map
    return origin, rows, cols, (i_patch // per_row) * R, (i_patch % per_row) * C


@triton.jit
def patch_places(
    origin, rows, cols, row0, col0, width, dilation, R: tl.constexpr, C: tl.constexpr
):
    """(M,) rows, columns and places of a patch, and which are on the map."""
    m = tl.arange(0, R * C)
    row, col = row0 + m // C, col0 + m % C
    o_m = origin + (row.to(tl.int64) * width + col) * dilation
    return row, col, o_m, (row < rows) & (col < cols)


@triton.jit
def walk_offsets(width, dilation, BN: tl.constexpr, WC: tl.constexpr):
    """(BN,) places of a walked tile from its first one; (BN,) their rows, columns."""
    n = tl.arange(0, BN)
    row, col = n // WC, n % WC
    return (row.to(tl.int64) * width + col) * dilation, row, col


@triton.jit
def window_start(i, size, kernel_size):
    """First key of the window of query ``i`` along one axis, clamped at the border."""
    return tl.minimum(tl.maximum(i - kernel_size // 2, 0), size - kernel_size)


@triton.jit
def keys_of_queries(first, count, size, kernel_size):
    """Keys [begin, end) in windows of queries [first, first + count) on the axis.

    Also whether no window is clamped: these keys are then within K // 2 and vice
    versa. Empty for queries off the map.
    """
    last = tl.minimum(first + count, size) - 1
    begin = window_start(first, size, kernel_size)
    end = window_start(last, size, kernel_size) + kernel_size
    half = kernel_size // 2
    inner = (first >= half) & (first + count <= size - half)
    return begin, tl.where(first < size, end, begin), inner


@triton.jit
def queries_of_keys(first, count, size, kernel_size):
    """Queries [begin, end) whose windows hold any of keys [first, first + count).

    Also whether these keys are seen from within K // 2 only. Empty off the map.
    """
    half = kernel_size // 2
    last = first + count - 1
    begin = tl.where(first < kernel_size, 0, first - half)
    end = tl.where(last < size - kernel_size, last + half + 1, size)
    inner = (first >= kernel_size) & (last < size - kernel_size)
    return begin, tl.where(first < size, end, begin), inner


@triton.jit
def column_tiles(begin, end, col0, kernel_size, WC: tl.constexpr):
    """Range of jx that covers columns [begin, end)."""
    zero = col0 - kernel_size // 2
    # From -WC on, as division rounds to zero.
    return (begin - zero + WC) // WC - 1, tl.cdiv(end - zero + WC, WC) - 1


@triton.jit
def bias_offsets(R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, WC: tl.constexpr):
    """(M, BN) offsets in the table from the entry of the tile's and patch's origin."""
    m, n = tl.arange(0, R * C), tl.arange(0, BN)
    row = (n // WC)[None, :] - (m // C)[:, None]
    return row * (C * WC) + (m % C)[:, None] * WC + (n % WC)[None, :]


@triton.jit
def table_slab(
    p_table, i_h, jx, row0, kernel_size,
    R: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, WC: tl.constexpr,
    BORDER: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Where the biases of a column of tiles begin: add the tile's row times C * WC."""
    WR: tl.constexpr = BN // WC
    rows = 2 * (R + kernel_size - 2) + WR
    slab = 0
    if BORDER:
        slab = jx + 2
    if HAS_BIAS:
        slab += i_h * 4
    row = slab * rows.to(tl.int64) + (R + kernel_size - 2) - row0
    return p_table + row * (C * WC)


@triton.jit
def hide(x, key_row, key_col, start_row, start_col, kernel_size):
    """-inf where a key is not in the window that begins at (start_row, start_col)."""
    y, x_col = key_row - start_row, key_col - start_col
    seen = (y >= 0) & (y < kernel_size) & (x_col >= 0) & (x_col < kernel_size)
    return tl.where(seen, x, -float('inf'))
