"""Host side of the deform_sdpa kernels: what every launch of one call shares."""

import math

import torch
from torch import Tensor

from ..common import triton_host
from ..common.block_sizes import pad_head_dim
from ..common.constants import LOG2E
from .block_sizes import Tile, block_sizes


def channels_last(x: Tensor) -> Tensor:
    """x, copied if its channels are not contiguous: loads are along them."""
    return x if x.stride(-1) == 1 else x.contiguous()


class DeformSdpaCall:
    """One call of deform_sdpa; coords (B, Vq, G, N, V, P, 2)."""

    def __init__(self, q, k, v, coords, seed, grid_size, scale, dropout_p, more=()):
        """``more``: strides of further tensors, passed on after those of q, k, v."""
        self.q, self.k, self.v = (channels_last(x) for x in (q, k, v))
        if self.k.stride(3) != self.v.stride(3):
            self.k, self.v = self.k.contiguous(), self.v.contiguous()
        of_k, of_v = self.k.stride(), self.v.stride()
        self.strides = (*self.q.stride()[:4], *of_k[:3], *of_v[:3], of_k[3], *more)
        self.step = math.gcd(16, *self.strides)
        self.coords = coords.contiguous()
        self.seed, self.grid_size = seed, grid_size
        self.scale, self.dropout_p = scale, dropout_p
        self.batch, self.query_views, self.heads, self.queries, self.head_dim = q.shape
        self.views, self.kv_heads, self.pixels = k.shape[1:4]
        self.groups, self.points = coords.shape[2], coords.shape[5]
        self.heads_sharing = math.gcd(
            self.heads // self.kv_heads, self.heads // self.groups
        )

    def new_outputs(self) -> tuple[Tensor, Tensor]:
        """out and lse, not yet written."""
        out = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        return out, self.q.new_empty(self.q.shape[:4], dtype=torch.float32)

    def tile(self, kernel: str) -> Tile:
        return block_sizes(
            kernel,
            self.head_dim,
            self.q.dtype,
            triton_host.architecture(self.q.device),
            self.heads_sharing,
        )

    def parts(self, tile: Tile) -> int:
        """Blocks of heads of all stacks: so many programs sample for one query."""
        return self.heads // self.heads_sharing * self.blocks(tile)

    def blocks(self, tile: Tile) -> int:
        return -(-self.heads_sharing // tile.heads)

    def grid(self, tile: Tile) -> tuple[int]:
        tiles = -(-self.queries // tile.queries)
        return (tiles * self.query_views * self.parts(tile) * self.batch,)

    def input_strides(self) -> tuple[int, ...]:
        """In steps: those of q, k and v but for channels; one of pixels of k and v."""
        return tuple(stride // self.step for stride in self.strides)

    def is_wide(self) -> bool:
        """Whether offsets inside a map need 64 bits."""
        stride = max(self.k.stride(3), self.head_dim)
        return self.pixels * stride + self.head_dim >= 2**31

    def arguments(self, tile: Tile) -> dict:
        """Arguments by name that both kernels have in common."""
        height, width = self.grid_size
        return dict(
            num_stacks=self.heads // self.heads_sharing,
            num_blocks=self.blocks(tile),
            heads_sharing=self.heads_sharing,
            heads_per_kv=self.heads // self.kv_heads,
            heads_per_group=self.heads // self.groups,
            num_heads=self.heads,
            query_views=self.query_views,
            num_queries=self.queries,
            views=self.views,
            points=self.points,
            height=height,
            width=width,
            scale_log2=self.scale * LOG2E,
            seed=self.seed,
            dropout_p=self.dropout_p,
            D=self.head_dim,
            DP=pad_head_dim(self.head_dim),
            BQ=tile.queries,
            BR=tile.heads,
            VEC=tile.channels,
            STEP=self.step,
            WIDE=self.is_wide(),
            DROPOUT=self.dropout_p > 0,
        )
