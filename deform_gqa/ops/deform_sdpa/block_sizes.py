"""Tiles of the deform_sdpa kernels."""

import dataclasses
import functools

import torch

from ..common.block_sizes import pad_head_dim

# Nothing is shared between warps, so programs of one warp wait for no other.
WARPS = 1


@dataclasses.dataclass(frozen=True)
class Tile:
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
def block_sizes(
    kernel: str, head_dim: int, dtype: torch.dtype, arch: int, heads_sharing: int
) -> Tile:
    """The tile of one kernel: all lanes of a program span (queries, channels).

    Args:
        kernel: 'deform_sdpa_fwd', 'deform_sdpa_bwd' or 'deform_sdpa_bwd_fixed', which
            is that with fixed-point sums.
        head_dim: D, 8 to 256.
        dtype: dtype of q.
        arch: Compute capability as 80 or 90.
        heads_sharing: Query heads that share kv head and offset group.
    """
    padded = pad_head_dim(head_dim)
    heads = min(8, 1 << (heads_sharing - 1).bit_length())
    channels = 16 // dtype.itemsize
    is_fixed = kernel == 'deform_sdpa_bwd_fixed'
    # Older GPUs have no atomic of several float32.
    atomic = 4 if arch >= 90 and not is_fixed else 1
    if kernel == 'deform_sdpa_fwd':
        if padded > 32 * channels:
            heads = min(heads, 4)
        queries = 32 * WARPS * channels // padded
    else:
        # Heads come first: every block of heads gathers and scatters anew. What a
        # lane holds of them and of the corners, two vectors of each beside few heads
        # or one, stays in registers; atomics of one number take more of those.
        most = 8 if atomic == 4 and arch != 100 else 4
        heads = min(heads, most if padded < 256 else 2)
        numbers = 2 * channels if atomic == 4 and heads <= 2 else 8
        if is_fixed and padded == 256:  # else it spills
            channels = 4
        queries = 32 * WARPS * numbers // (2 * padded)
    queries = max(WARPS, queries)
    registers = 255 if heads > 1 or is_fixed else None
    return Tile(queries, heads, channels, atomic, WARPS, registers)
