"""Host side of the deform_attn kernels: what every launch of one call shares."""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from .block_sizes import (
    BlockSizes,
    block_sizes,
    dot_part,
    fuses_bias_gradient,
    pad_head_dim,
)
from .key_taps import key_taps
from .pack_table import pack_table, row_pitch
from .patches import (
    MAX_WINDOW,
    MIN_WINDOW,
    Axis,
    Patch,
    axis_of,
    choose_patch,
    flat_patch,
    window_of,
)

LOG2_E = math.log2(math.e)
# The bias enters the kernels divided by the scale of the logits: scales below this
# go into q instead, so that the packed table keeps its range.
MIN_SCALE = 2.0**-6


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as 80 or 90; 80 where there is no GPU (the interpreter)."""
    if device.type != 'cuda':
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def vector(*tensors: Tensor) -> int:
    """Longest vector, in elements, at whose multiples all rows (..., D) begin.

    At most 16 bytes; 1 where D is not contiguous, and where all strides are multiples
    of 16: Triton sees that itself, and telling it costs a few registers.
    """
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    if all(stride % 16 == 0 for stride in strides):
        return 1
    return math.gcd(16 // tensors[0].element_size(), *strides)


def split_scale(scale: float) -> tuple[float, float]:
    """(factor of q, positive factor of the logits); the former is 1 as a rule."""
    positive = max(abs(scale), MIN_SCALE)
    return scale / positive, positive


@dataclasses.dataclass
class Problem:
    """One call of deform_attn: shapes, scales and the geometry of the bias."""

    q: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor | None
    rpb_table: Tensor | None
    seed: int
    grid_size: tuple[int, int]
    scale: float
    dropout_p: float
    pos_in_range: bool

    def __post_init__(self):
        self.batch, self.heads, self.queries, self.head_dim = self.q.shape
        self.kv_heads, self.keys = self.k.shape[1:3]
        self.arch = architecture(self.q.device)
        self.has_bias = self.rpb_table is not None
        self.groups = self.pos.shape[1] if self.has_bias else 1
        # Query heads with keys and positions in common.
        self.heads_sharing = math.gcd(
            self.heads // self.kv_heads, self.heads // self.groups
        )
        self.q_factor, self.scale = split_scale(self.scale)
        if self.has_bias:
            self.map_size = self.grid_size
            self.table_size = tuple(self.rpb_table.shape[1:])
            self.axis_y, self.axis_x = (
                axis_of(*sizes)
                for sizes in zip(self.grid_size, self.table_size, strict=True)
            )
        else:
            self.map_size = (self.queries, 1)
            self.table_size = (1, 1)
            self.axis_y = self.axis_x = Axis(0.0, 0.0, 0.0)

    def sizes(self, op: str) -> BlockSizes:
        """Block sizes of an op; smaller where a fine table or dropout take room."""
        sizes = block_sizes(op, self.head_dim, self.q.dtype, self.arch)
        # Tiles of keys hold as many columns of the table for each key.
        fewest_keys = 8 if op == 'deform_attn_dbias' or sizes.warps == 4 else 16
        window = self.window()
        fewest_queries = 64 if window < MAX_WINDOW else 16
        while window > MIN_WINDOW:
            window //= 2
            if sizes.keys > fewest_keys:
                sizes = dataclasses.replace(sizes, keys=sizes.keys // 2, stages=1)
            elif sizes.queries > fewest_queries:
                sizes = dataclasses.replace(sizes, queries=sizes.queries // 2, stages=1)
        if self.dropout_p == 0:
            if op == 'deform_attn_dkdv' and self._has_room_for_keys():
                sizes = dataclasses.replace(sizes, keys=2 * sizes.keys)
            return sizes
        sizes = dataclasses.replace(sizes, stages=1)
        if sizes.keys > 16:
            return dataclasses.replace(sizes, keys=sizes.keys // 2)
        if sizes.queries == 64:  # more queries have registers left
            sizes = dataclasses.replace(sizes, queries=32, warps=8)
        return sizes

    def _has_room_for_keys(self) -> bool:
        """Without a bias the tiles of 16-bit keys may be twice as large."""
        small = self.head_dim <= 64 and self.q.element_size() == 2
        return small and not self.has_bias

    def window(self) -> int:
        """Table columns that 16 queries reach from one key: more of a fine table."""
        if not self.has_bias:
            return MIN_WINDOW
        return min(window_of(self.axis_x.step, 16), MAX_WINDOW)

    def has_fine_table(self) -> bool:
        return self.window() > MIN_WINDOW

    def fuses_bias_gradient(self) -> bool:
        """Dropout, fine tables and masked sums in fixed point take its registers."""
        fits = fuses_bias_gradient(self.head_dim, self.q.dtype)
        masked = self.head_dim != pad_head_dim(self.head_dim)
        if masked and torch.are_deterministic_algorithms_enabled():
            return False
        return fits and not self.has_fine_table() and self.dropout_p == 0

    def patch(self, sizes: BlockSizes) -> Patch:
        """Of a kernel whose programs walk over keys: of the rows of stacked heads."""
        height, width = self.map_size
        height *= self.heads_sharing
        if not self.has_bias:
            return flat_patch(sizes.queries, height)
        return choose_patch(sizes.queries, height, width, self.axis_x.step)

    def packed_table(self, patch: Patch) -> Tensor | None:
        """In float16 beside 16-bit q: its 11 bits lose less than a bfloat16 bias."""
        if not self.has_bias:
            return None
        dtype = torch.float32 if self.q.dtype == torch.float32 else torch.float16
        return pack_table(self.rpb_table, patch.window, 1 / self.scale, dtype)

    def key_taps(self, sizes: BlockSizes) -> Tensor | None:
        if not self.has_bias:
            return None
        return key_taps(self.pos, self.axis_y, self.axis_x, sizes.keys)

    def num_patches(self, patch: Patch, heads: int = 1) -> int:
        """Patches of the rows of so many stacked heads."""
        height, width = self.map_size
        return math.ceil(height * heads / patch.rows) * math.ceil(width / patch.cols)

    def grid(self, patch: Patch) -> tuple[int]:
        """Programs of such a kernel."""
        heads = self.heads_sharing
        return (self.batch * self.heads // heads * self.num_patches(patch, heads),)

    def input_strides(self) -> tuple[int, ...]:
        return *self.q.stride(), *self.k.stride(), *self.v.stride()

    def arguments(self, patch: Patch) -> dict:
        """Arguments by name that the forward and backward kernels have in common."""
        height, width = self.map_size
        table_h, table_w = self.table_size
        return dict(
            num_heads=self.heads,
            heads_per_kv=self.heads // self.kv_heads,
            heads_per_group=self.heads // self.groups,
            num_keys=self.keys,
            head_dim=self.head_dim,
            height=height,
            width=width,
            table_h=table_h,
            table_w=table_w,
            row_pitch=row_pitch(table_w, patch.window),
            step_y=self.axis_y.step,
            step_x=self.axis_x.step,
            q_factor=self.q_factor,
            scale_log2=self.scale * LOG2_E,
            seed=self.seed,
            dropout_p=self.dropout_p,
            D=self.head_dim,
            DP=pad_head_dim(self.head_dim),
            PART=dot_part(self.head_dim, self.q.dtype),
            R=patch.rows,
            C=patch.cols,
            CW=patch.window,
            HAS_BIAS=self.has_bias,
            IN_RANGE=self.pos_in_range,
            DROPOUT=self.dropout_p > 0,
            SCALE_Q=self.q_factor != 1.0,
            KV_VEC=vector(self.k, self.v),
            # The default up to Triton 3.9 only.
            enable_fp_fusion=True,
            # Or the compiler spills a few registers for a step of occupancy.
            maxnreg=255 if self.has_fine_table() else None,
        )
