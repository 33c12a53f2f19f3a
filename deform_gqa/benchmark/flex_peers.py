"""FlexAttention with the biases of our ops, as the strongest generic peer.

FlexAttention differentiates tensors that its score function captures, but each may
be read at one place only: the four taps of a bilinear lookup need a copy each.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .op_cases import DeformAttnCase, NeighborhoodAttnCase


def _tap(index: Tensor, size: int, pos: Tensor, table_size: int) -> Tensor:
    """Coordinate in the table padded by a cell of zeros, for a query and a key."""
    half = (table_size - 1) / 2
    query = index.to(torch.float32) * (half / (size - 1)) if size > 1 else half / 2
    return (query + half / 2 * (1 - pos) + 1).clamp(0, table_size + 1)


class FlexDeformAttn:
    """deform_attn by FlexAttention; ``attend`` is its (compiled) function."""

    def __init__(self, case: DeformAttnCase, attend):
        self.case = case
        self.attend = attend

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        grouped = self.case.num_kv_heads != self.case.num_heads
        return self.attend(
            tensors['q'],
            tensors['k'],
            tensors['v'],
            score_mod=self._score_mod(tensors['pos'], tensors['rpb_table']),
            enable_gqa=grouped,
        )

    def _score_mod(self, pos: Tensor, rpb_table: Tensor):
        height, width = self.case.grid_size
        table_h, table_w = self.case.table_size
        group_size = self.case.num_heads // self.case.offset_groups
        padded = F.pad(rpb_table, (1, 1, 1, 1))
        t00, t01, t10, t11 = (padded.clone() for _ in range(4))
        pos_y, pos_x = pos[..., 0].contiguous(), pos[..., 1].contiguous()

        def score_mod(score, b, h, n, s):
            y = _tap(n // width, height, pos_y[b, h // group_size, s], table_h)
            x = _tap(n % width, width, pos_x[b, h // group_size, s], table_w)
            y0 = y.detach().floor().clamp(max=table_h)
            x0 = x.detach().floor().clamp(max=table_w)
            fy, fx = y - y0, x - x0
            y0, x0 = y0.to(torch.int32), x0.to(torch.int32)
            upper = (1 - fx) * t00[h, y0, x0] + fx * t01[h, y0, x0 + 1]
            lower = (1 - fx) * t10[h, y0 + 1, x0] + fx * t11[h, y0 + 1, x0 + 1]
            return score + (1 - fy) * upper + fy * lower

        return score_mod


class FlexNeighborhoodAttn:
    """neighborhood_attn by FlexAttention; the block mask is made once, untimed."""

    def __init__(self, case: NeighborhoodAttnCase, attend, block_mask=None):
        self.case = case
        self.attend = attend
        self.block_mask = block_mask

    def _mask_mod(self):
        """Whether key s is in the window of query n, clamped at the borders."""
        (height, width), half = self.case.grid_size, self.case.kernel_size // 2

        def mask_mod(b, h, n, s):
            centre_y = (n // width).clamp(half, height - 1 - half)
            centre_x = (n % width).clamp(half, width - 1 - half)
            near_y = (centre_y - s // width).abs() <= half
            near_x = (centre_x - s % width).abs() <= half
            return near_y & near_x

        return mask_mod

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.block_mask is None:
            self.block_mask = self._make_block_mask(tensors['q'].device)
        grouped = self.case.num_kv_heads != self.case.num_heads
        return self.attend(
            tensors['q'],
            tensors['k'],
            tensors['v'],
            score_mod=self._score_mod(tensors['rpb']),
            block_mask=self.block_mask,
            enable_gqa=grouped,
        )

    def _make_block_mask(self, device: torch.device):
        from torch.nn.attention.flex_attention import create_block_mask

        size = self.case.num_queries
        # Compiled, the mask of all pairs is never written to memory.
        compiled = device.type == 'cuda'
        return create_block_mask(
            self._mask_mod(), None, None, size, size, device=device, _compile=compiled
        )

    def _score_mod(self, rpb: Tensor):
        width = self.case.grid_size[1]
        last = 2 * self.case.kernel_size - 2
        shift = self.case.kernel_size - 1

        def score_mod(score, b, h, n, s):
            # Clamped, since scores are computed before they are masked.
            y = (s // width - n // width + shift).clamp(0, last)
            x = (s % width - n % width + shift).clamp(0, last)
            return score + rpb[h, y, x]

        return score_mod


def compiled_flex_attention():
    """FlexAttention compiled for the next shapes alone.

    Past its limit of recompilations torch.compile would fall back to an unfused
    version: every case starts from an empty cache.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)
