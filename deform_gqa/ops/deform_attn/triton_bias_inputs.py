"""What the kernels read for the bias, made by one launch: key taps and packed table.

One launch for both, and for all layouts of the taps: on the host each takes longer
than its work on the device.
"""

import dataclasses
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_host import Launch, Layout
from .patches import TableAxis
from .triton_key_taps import taps_shape, write_key_taps
from .triton_pack_table import pack_entries, packed_shape

# Keys and entries of the table that one program works on.
KEYS, ENTRIES = 256, 1024
# Tap layouts of one launch: backward has up to three kernels that read them.
MAX_TILES = 3
# Entries beyond this times the logits' scale would overflow float16 operands.
FLOAT16_LIMIT = 60000.0


@triton.jit(do_not_specialize=[
    "num_tap_programs", "groups", "num_keys", "pos_b", "pos_g", "pos_s", "table_h",
    "table_w", "num_blocks", "stride_h", "stride_y",
])  # fmt: skip
def bias_inputs_kernel(
    p_pos, p_taps_0, p_taps_1, p_taps_2, p_table, p_packed,
    pos_b, pos_g, pos_s, pos_c, stride_h, stride_y, stride_x,
    num_tap_programs, groups, num_keys, half_y, half_x, base_y, base_x,
    table_h, table_w, num_blocks, factor, limit,
    BN_0: tl.constexpr, BN_1: tl.constexpr, BN_2: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if i < num_tap_programs:
        num_s = tl.cdiv(num_keys, BLOCK_KEYS)
        i_bg = (i // num_s).to(tl.int64)
        o_s = i % num_s * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        m_s = o_s < num_keys
        p = p_pos + i_bg // groups * pos_b + i_bg % groups * pos_g
        p += o_s.to(tl.int64) * pos_s
        # (BLOCK_KEYS,)
        b_y = tl.load(p, mask=m_s, other=1.0)
        b_x = tl.load(p + pos_c, mask=m_s, other=1.0)
        t_y = base_y + (1.0 - b_y) * half_y
        t_x = base_x + (1.0 - b_x) * half_x
        write_key_taps(p_taps_0, i_bg, o_s, m_s, t_y, t_x, num_keys, BN_0)
        if BN_1 > 0:
            write_key_taps(p_taps_1, i_bg, o_s, m_s, t_y, t_x, num_keys, BN_1)
        if BN_2 > 0:
            write_key_taps(p_taps_2, i_bg, o_s, m_s, t_y, t_x, num_keys, BN_2)
    else:
        pack_entries(
            i - num_tap_programs, p_table, p_packed, stride_h, stride_y, stride_x,
            table_h, table_w, num_blocks, factor, limit, BLOCK,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BiasInputs:
    """Makes the key taps and the packed table for the kernels of one direction.

    Attributes:
        pos: Layout of the positions.
        rpb_table: Layout of the table.
        axes: Maps from positions to the table, along y and x.
        tiles: Key taps are made for tiles of each of these numbers of keys.
        window: Rows of the packed table have room for windows of up to this width.
        factor: Of the table's entries.
        dtype: Of the packed table.
    """

    pos: Layout
    rpb_table: Layout
    axes: tuple[TableAxis, TableAxis]
    tiles: tuple[int, ...]
    window: int
    factor: float
    dtype: torch.dtype

    @functools.cached_property
    def taps_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(taps_shape(self.pos.shape, tile) for tile in self.tiles)

    @functools.cached_property
    def packed_shape(self) -> tuple[int, ...]:
        return packed_shape(self.rpb_table.shape, self.window)

    @functools.cached_property
    def launch(self) -> Launch:
        batch, groups, keys, _ = self.pos.shape
        heads, table_h, table_w = self.rpb_table.shape
        # A block of keys holds the tiles that it ends in.
        taps = batch * groups * math.ceil(keys / KEYS)
        entries = heads * math.ceil(math.prod(self.packed_shape[1:]) / ENTRIES)
        y, x = self.axes
        tiles = *self.tiles, *[0] * (MAX_TILES - len(self.tiles))
        options = dict(
            num_tap_programs=taps,
            groups=groups,
            num_keys=keys,
            half_y=y.half,
            half_x=x.half,
            base_y=y.base,
            base_x=x.base,
            table_h=table_h,
            table_w=table_w,
            num_blocks=self.packed_shape[3],
            factor=self.factor,
            limit=FLOAT16_LIMIT if self.dtype == torch.float16 else math.inf,
            **{f'BN_{i}': tile for i, tile in enumerate(tiles)},
            BLOCK_KEYS=KEYS,
            BLOCK=ENTRIES,
            enable_fp_fusion=True,
        )
        strides = *self.pos.strides, *self.rpb_table.strides
        return Launch((taps + entries,), strides, options)

    def make(self, pos: Tensor, rpb_table: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Key taps by the keys of a tile, and the packed table."""
        taps = [pos.new_empty(s, dtype=torch.float32) for s in self.taps_shapes]
        packed = rpb_table.new_empty(self.packed_shape, dtype=self.dtype)
        absent = [None] * (MAX_TILES - len(taps))
        self.launch(bias_inputs_kernel, pos, *taps, *absent, rpb_table, packed)
        return dict(zip(self.tiles, taps, strict=True)), packed
