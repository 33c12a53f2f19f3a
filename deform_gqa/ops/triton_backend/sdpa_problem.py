"""Host side of the deform_sdpa kernels: what every launch of one call shares."""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from . import problem
from .block_sizes import pad_head_dim

LOG2_E = math.log2(math.e)
# Nothing is shared between warps, so programs of one warp wait for no other.
WARPS = 1


@dataclasses.dataclass(frozen=True)
class SdpaTile:
    """Attributes:
    queries, heads: Of a tile, powers of two.
    channels: Of a row of q that a lane loads at once. Those of k and v are loaded by
        16 bytes whatever it is.
    atomic: Numbers that one atomic adds.
    warps: num_warps.
    registers: Most of a lane; None leaves it to the compiler, which rather spills a
        few than gives up a step of occupancy.
    """

    queries: int
    heads: int
    channels: int
    atomic: int
    warps: int
    registers: int | None

    @property
    def options(self) -> dict[str, int | bool]:
        """Of a launch."""
        # The default up to Triton 3.9 only
        options = dict(num_warps=self.warps, num_stages=1, enable_fp_fusion=True)
        if self.registers is not None:
            options['maxnreg'] = self.registers
        return options


@functools.cache
def sdpa_tile(
    op: str, heads_per_unit: int, head_dim: int, dtype: torch.dtype, arch: int
) -> SdpaTile:
    """The tile of one kernel: all lanes of a program span (queries, channels).

    Args:
        op: 'deform_sdpa_fwd', 'deform_sdpa_bwd' or 'deform_sdpa_bwd_fixed', that with
            fixed-point sums.
        heads_per_unit: Query heads that share kv head and offset group.
        head_dim: D, 8 to 256.
        dtype: dtype of q.
        arch: Compute capability as 80 or 90.
    """
    padded = pad_head_dim(head_dim)
    heads = min(8, 1 << (heads_per_unit - 1).bit_length())
    channels = 16 // dtype.itemsize
    is_fixed = op == 'deform_sdpa_bwd_fixed'
    # Older GPUs have no atomic of several float32.
    atomic = 4 if arch >= 90 and not is_fixed else 1
    if op == 'deform_sdpa_fwd':
        if padded > 32 * channels:
            heads = min(heads, 4)
        queries = 32 * WARPS * channels // padded
    else:
        # Heads come first: every block of heads gathers and scatters anew. What a
        # lane holds of them and of the corners, two vectors of each or one beside the
        # most heads, stays in registers; atomics of one number take more of those.
        most = 8 if atomic == 4 else 4
        heads = min(heads, most if padded < 256 else 2)
        numbers = 8 if heads == most else 2 * channels
        if is_fixed and padded == 256:  # else it spills
            channels = 4
        queries = 32 * WARPS * numbers // (2 * padded)
    queries = max(WARPS, queries)
    registers = 255 if heads > 1 or is_fixed else None
    return SdpaTile(queries, heads, channels, atomic, WARPS, registers)


def channels_last(x: Tensor) -> Tensor:
    """x, copied if its channels are not contiguous: loads are along them."""
    return x if x.stride(-1) == 1 else x.contiguous()


class SdpaProblem:
    """One call of deform_sdpa; coords (B, Vq, G, N, V, P, 2)."""

    def __init__(self, q, k, v, coords, seed, grid_size, scale, dropout_p, more=()):
        """``more``: strides of further tensors, passed on after those of q, k, v."""
        self.q, self.k, self.v = (channels_last(x) for x in (q, k, v))
        if self.k.stride(3) != self.v.stride(3):
            self.k, self.v = self.k.contiguous(), self.v.contiguous()
        of_k, of_v = self.k.stride(), self.v.stride()
        self.strides = (*self.q.stride()[:4], *of_k[:3], *of_v[:3], of_k[3], *more)
        self.unit = math.gcd(16, *self.strides)
        self.coords = coords.contiguous()
        self.seed, self.grid_size = seed, grid_size
        self.scale, self.dropout_p = scale, dropout_p
        self.batch, self.query_views, self.heads, self.queries, self.head_dim = q.shape
        self.views, self.kv_heads, self.pixels = k.shape[1:4]
        self.groups, self.points = coords.shape[2], coords.shape[5]
        self.heads_per_unit = math.gcd(
            self.heads // self.kv_heads, self.heads // self.groups
        )

    def new_outputs(self) -> tuple[Tensor, Tensor]:
        """out and lse, not yet written."""
        out = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        return out, self.q.new_empty(self.q.shape[:4], dtype=torch.float32)

    def tile(self, op: str) -> SdpaTile:
        return sdpa_tile(
            op,
            self.heads_per_unit,
            self.head_dim,
            self.q.dtype,
            problem.architecture(self.q.device),
        )

    def parts(self, tile: SdpaTile) -> int:
        """Blocks of heads of all units: so many programs sample for one query."""
        return self.heads // self.heads_per_unit * self.blocks(tile)

    def blocks(self, tile: SdpaTile) -> int:
        return -(-self.heads_per_unit // tile.heads)

    def grid(self, tile: SdpaTile) -> tuple[int]:
        tiles = -(-self.queries // tile.queries)
        return (tiles * self.query_views * self.parts(tile) * self.batch,)

    def input_strides(self) -> tuple[int, ...]:
        """In units: those of q, k and v but for channels; one of pixels of k and v."""
        return tuple(stride // self.unit for stride in self.strides)

    def is_wide(self) -> bool:
        """Whether offsets inside a map need 64 bits."""
        stride = max(self.k.stride(3), self.head_dim)
        return self.pixels * stride + self.head_dim >= 2**31

    def arguments(self, tile: SdpaTile) -> dict:
        """Arguments by name that both kernels have in common."""
        height, width = self.grid_size
        return dict(
            num_units=self.heads // self.heads_per_unit,
            num_blocks=self.blocks(tile),
            heads_per_unit=self.heads_per_unit,
            heads_per_kv=self.heads // self.kv_heads,
            heads_per_group=self.heads // self.groups,
            num_heads=self.heads,
            query_views=self.query_views,
            num_queries=self.queries,
            views=self.views,
            points=self.points,
            height=height,
            width=width,
            scale_log2=self.scale * LOG2_E,
            seed=self.seed,
            dropout_p=self.dropout_p,
            D=self.head_dim,
            DP=pad_head_dim(self.head_dim),
            BQ=tile.queries,
            BR=tile.heads,
            VEC=tile.channels,
            UNIT=self.unit,
            WIDE=self.is_wide(),
            DROPOUT=self.dropout_p > 0,
        )
