"""Host side of the neighborhood_attn kernels: what every launch of one call shares."""

import dataclasses

from torch import Tensor

from ..common import triton_host
from ..common.block_sizes import BlockSizes, dot_part, pad_head_dim
from ..common.constants import LOG2E
from ..common.triton_host import layout, split_scale, vector
from .block_sizes import block_sizes
from .patches import NeighborhoodTile, choose_tile
from .triton_table import neighborhood_table


@dataclasses.dataclass
class NeighborhoodCall:
    """One call of neighborhood_attn."""

    q: Tensor
    k: Tensor
    v: Tensor
    rpb: Tensor | None
    seed: int
    grid_size: tuple[int, int]
    kernel_size: int
    dilation: int
    scale: float
    dropout_p: float

    def __post_init__(self):
        self.batch, self.heads, self.places, self.head_dim = self.q.shape
        self.kv_heads = self.k.shape[1]
        self.q_factor, self.scale = split_scale(self.scale)
        self.part = dot_part(self.head_dim, self.q.dtype)
        # Of the largest sub-map.
        self.map_size = tuple(-(-side // self.dilation) for side in self.grid_size)

    def output_parts(self) -> list[dict]:
        """Arguments of the launches that share the output dimensions of large heads.

        All D would not fit into registers; one launch takes them where they do.
        """
        return [
            dict(first_dim=first, OUT=min(self.part, self.head_dim - first))
            for first in range(0, self.head_dim, self.part)
        ]

    def sizes(self, kernel: str) -> BlockSizes:
        arch = triton_host.architecture(self.q.device)
        dropout = self.dropout_p > 0
        return block_sizes(kernel, self.head_dim, self.q.dtype, arch, dropout)

    def tile(self, owned: int, walked: int, row_pairs: int = 1) -> NeighborhoodTile:
        return choose_tile(owned, walked, *self.map_size, self.kernel_size, row_pairs)

    def num_patches(self, tile: NeighborhoodTile) -> int:
        """Of all sub-maps, of one head."""
        height, width = self.map_size
        patches = -(-height // tile.rows) * -(-width // tile.cols)
        return self.dilation**2 * patches

    def table(self, tile: NeighborhoodTile, owns_keys: bool) -> Tensor:
        return neighborhood_table(
            self.rpb, tile, self.kernel_size, self.scale, owns_keys, self.q.device
        )

    def input_strides(self) -> tuple[int, ...]:
        return *self.q.stride(), *self.k.stride(), *self.v.stride()

    def arguments(self, tile: NeighborhoodTile) -> dict:
        """Arguments by name that the forward and backward kernels have in common."""
        height, width = self.grid_size
        return dict(
            num_heads=self.heads,
            heads_per_kv=self.heads // self.kv_heads,
            num_patches=self.num_patches(tile),
            height=height,
            width=width,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            q_factor=self.q_factor,
            scale_log2=self.scale * LOG2E,
            seed=self.seed,
            dropout_p=self.dropout_p,
            head_dim=self.head_dim,
            D=self.head_dim,
            DP=pad_head_dim(self.head_dim),
            PART=self.part,
            R=tile.rows,
            C=tile.cols,
            BN=tile.walked,
            WC=tile.walk_cols,
            HAS_BIAS=self.rpb is not None,
            DROPOUT=self.dropout_p > 0,
            SCALE_Q=self.q_factor != 1.0,
            KV_VEC=vector(layout(self.k), layout(self.v)),
            # The default up to Triton 3.9 only.
            enable_fp_fusion=True,
        )
