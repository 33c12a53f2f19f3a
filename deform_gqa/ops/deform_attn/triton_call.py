"""Host side of the deform_attn kernels: what every launch of one call shares."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..common import triton_host
from ..common.block_sizes import BlockSizes, dot_part, pad_head_dim
from ..common.constants import LOG2E
from ..common.triton_host import (
    Layout,
    cached_call,
    layout,
    optional_layout,
    split_scale,
    vector,
)
from .block_sizes import Features, block_sizes
from .patches import (
    MAX_WINDOW,
    MIN_WINDOW,
    Patch,
    TableAxis,
    axis_of,
    choose_patch,
    flat_patch,
    window_of,
)
from .triton_bias_inputs import BiasInputs


@dataclasses.dataclass(eq=False)
class DeformAttnCall:
    """Calls of deform_attn that differ in no layout and no option, but in values.

    From :func:`deform_attn_call`, which returns the same object for all of them: what
    it has found for their launches is kept.
    """

    q: Layout
    k: Layout
    v: Layout
    pos: Layout | None
    rpb_table: Layout | None
    grid_size: tuple[int, int]
    scale: float
    dropout_p: float
    pos_in_range: bool
    arch: int
    deterministic: bool

    def __post_init__(self):
        self.batch, self.heads, self.queries, self.head_dim = self.q.shape
        self.kv_heads, self.keys = self.k.shape[1:3]
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
            self.axis_y = self.axis_x = TableAxis(0.0, 0.0, 0.0)
        window = MIN_WINDOW
        if self.has_bias:
            window = min(window_of(self.axis_x.step, 16), MAX_WINDOW)
        self.features = Features(
            window=window,
            bias=self.has_bias,
            dropout=self.dropout_p > 0,
            deterministic=self.deterministic,
        )
        self._launches = {}

    def cached(self, find: Callable[..., Any], *layouts: Layout) -> Any:
        """``find(self, *layouts)``, found once: the launches of one direction."""
        key = find, *layouts
        if key not in self._launches:
            self._launches[key] = find(self, *layouts)
        return self._launches[key]

    def sizes(self, kernel: str) -> BlockSizes:
        return block_sizes(
            kernel, self.head_dim, self.q.dtype, self.arch, self.features
        )

    def patch(self, sizes: BlockSizes) -> Patch:
        """Of a kernel whose programs walk over keys: of the rows of stacked heads."""
        height, width = self.map_size
        height *= self.heads_sharing
        if not self.has_bias:
            return flat_patch(sizes.queries, height)
        return choose_patch(sizes.queries, height, width, self.axis_x.step)

    def bias_inputs(
        self, sizes: Iterable[BlockSizes], patches: Iterable[Patch]
    ) -> BiasInputs | None:
        """For kernels of these sizes and patches; None without a bias.

        The table is in float16 beside 16-bit q: its 11 bits lose less than a bfloat16
        bias.
        """
        if not self.has_bias:
            return None
        return BiasInputs(
            pos=self.pos,
            rpb_table=self.rpb_table,
            axes=(self.axis_y, self.axis_x),
            tiles=tuple(dict.fromkeys(s.keys for s in sizes)),
            window=max(patch.window for patch in patches),
            factor=1 / self.scale,
            dtype=torch.float32 if self.q.dtype == torch.float32 else torch.float16,
        )

    def num_patches(self, patch: Patch, heads: int = 1) -> int:
        """Patches of the rows of so many stacked heads."""
        height, width = self.map_size
        return math.ceil(height * heads / patch.rows) * math.ceil(width / patch.cols)

    def grid(self, patch: Patch) -> tuple[int]:
        """Programs of such a kernel."""
        heads = self.heads_sharing
        return (self.batch * self.heads // heads * self.num_patches(patch, heads),)

    def input_strides(self) -> tuple[int, ...]:
        return *self.q.strides, *self.k.strides, *self.v.strides

    def arguments(
        self, patch: Patch, sizes: BlockSizes, bias: BiasInputs | None
    ) -> dict:
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
            row_pitch=bias.packed_shape[3] if bias else 0,
            step_y=self.axis_y.step,
            step_x=self.axis_x.step,
            q_factor=self.q_factor,
            scale_log2=self.scale * LOG2E,
            dropout_p=self.dropout_p,
            D=self.head_dim,
            DP=pad_head_dim(self.head_dim),
            PART=dot_part(self.head_dim, self.q.dtype),
            R=patch.rows,
            C=patch.cols,
            CW=patch.window,
            BN=sizes.keys,
            NW=min(sizes.warps, sizes.keys),
            HAS_BIAS=self.has_bias,
            IN_RANGE=self.pos_in_range,
            DROPOUT=self.dropout_p > 0,
            SCALE_Q=self.q_factor != 1.0,
            KV_VEC=vector(self.k, self.v),
            # The default up to Triton 3.9 only.
            enable_fp_fusion=True,
            # Or the compiler spills a few registers for a step of occupancy.
            maxnreg=255 if self.features.fine_table else None,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )


_find_call = cached_call(DeformAttnCall)


def deform_attn_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    rpb_table: Tensor | None,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
    pos_in_range: bool,
) -> DeformAttnCall:
    """The call with these tensors' layouts and these options, on q's device."""
    return _find_call(
        layout(q),
        layout(k),
        layout(v),
        optional_layout(pos),
        optional_layout(rpb_table),
        grid_size,
        scale,
        dropout_p,
        pos_in_range,
        triton_host.architecture(q.device),
        torch.are_deterministic_algorithms_enabled(),
    )
