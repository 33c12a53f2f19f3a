"""Packs bias tables so that a window of two rows is one aligned wide load.

Four copies of the zero-padded table, each shifted by one more column, are cut into
blocks of 2 rows x 4 columns::

    packed[h, phase, y, b, dy, e] = padded[h, y + dy, 4 * b + phase + e]

A window that starts at column x is then the run of blocks from x // 4 in copy x % 4,
whatever x. Padded row 0 and column 0 stand for -1; the padding holds all rows and
columns that a tile may read, so that kernels check no bounds.
"""

import triton
import triton.language as tl

# Copies of the table, entries of a block, and rows that the padding adds.
PHASES = tl.constexpr(4)
ENTRIES = tl.constexpr(8)
PADDING_ROWS = tl.constexpr(3)


@triton.jit
def table_of_head(p_table, i_h, table_h, row_pitch):
    """The packed table of head i_h; ``row_pitch`` is the number of blocks of a row."""
    return p_table + i_h * (PHASES * ENTRIES * (table_h + PADDING_ROWS)) * row_pitch


@triton.jit
def pack_entries(
    i, p_table, p_packed, stride_h, stride_y, stride_x, table_h, table_w, num_blocks,
    factor, limit, BLOCK: tl.constexpr,
):  # fmt: skip
    """The i-th ``BLOCK`` entries; those of a head begin a block."""
    per_head = PHASES * ENTRIES * (table_h + PADDING_ROWS) * num_blocks
    num_programs = tl.cdiv(per_head, BLOCK)
    i_h = (i // num_programs).to(tl.int64)
    o = i % num_programs * BLOCK + tl.arange(0, BLOCK)
    block = o // 8
    phase = block // ((table_h + PADDING_ROWS) * num_blocks)
    y = (block // num_blocks) % (table_h + PADDING_ROWS) + (o // 4) % 2 - 1
    x = 4 * (block % num_blocks) + phase + o % 4 - 1
    inside = (y >= 0) & (y < table_h) & (x >= 0) & (x < table_w)
    o_cell = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    # (BLOCK,)
    b = tl.load(p_table + i_h * stride_h + o_cell, mask=inside, other=0.0)
    b = b.to(tl.float32) * factor
    b = tl.clamp(b, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    tl.store(
        p_packed + i_h * per_head + o,
        b.to(p_packed.dtype.element_ty),
        mask=o < per_head,
    )


def row_pitch(table_w: int, window: int) -> int:
    """Blocks of a packed row: a window may start at every cell from -1 to table_w."""
    return (table_w + 2 + window + 3) // 4 + 1


def packed_shape(table: tuple[int, ...], window: int) -> tuple[int, ...]:
    """(Hq, Th, Tw) -> (Hq, 4, Th + 3, blocks, 2, 4)."""
    heads, table_h, table_w = table
    rows = table_h + PADDING_ROWS.value
    return heads, PHASES.value, rows, row_pitch(table_w, window), 2, 4
