"""neighborhood_attn in the shapes of DAT-T++, and other people's ways to compute it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deform_gqa.ops.neighborhood_attn.naive import window_start

from .baselines import flex_baseline, sdpa_with_bias
from .case import ARCH, Baseline, Spec, StageCase, halved_size


@dataclasses.dataclass(frozen=True)
class NeighborhoodAttnCase(StageCase):
    """Neighborhood attention of kernel_size x kernel_size keys."""

    op: ClassVar[str] = 'neighborhood_attn'
    letter: ClassVar[str] = 'N'
    baselines: ClassVar[dict[str, Baseline]] = {
        'sdpa-bias': Baseline(
            lambda case: functools.partial(sdpa_neighborhood_attn, case)
        ),
        'flex': flex_baseline(lambda case, attend: FlexNeighborhoodAttn(case, attend)),
    }

    kernel_size: int

    @classmethod
    def own_fields(cls, stage: int, grid_size: tuple[int, int]) -> dict[str, Any]:
        size = ARCH['neighborhood_sizes'][stage - 1]
        # The backbone pads maps that are smaller than a window.
        height, width = (max(side, size) for side in grid_size)
        return dict(kernel_size=size, grid_size=(height, width))

    @property
    def keys_per_query(self) -> int:
        return self.kernel_size**2

    def input_specs(self, dtype: torch.dtype) -> dict[str, Spec]:
        kv = (self.batch, self.num_kv_heads, self.num_queries, self.head_dim)
        side = 2 * self.kernel_size - 1
        return {
            'q': ((self.batch, self.num_heads, self.num_queries, self.head_dim), dtype),
            'k': (kv, dtype),
            'v': (kv, dtype),
            'rpb': ((self.num_heads, side, side), torch.float32),
        }

    def options(self) -> dict[str, Any]:
        return {'grid_size': self.grid_size, 'kernel_size': self.kernel_size}

    def pair_values(self, backend: str) -> float:
        if backend == 'naive':  # gathers the keys and values of every window
            return self.pairs * self.head_dim * 4
        if backend == 'sdpa-bias':  # a dense mask for all images, and its gradient
            return 4 * self.num_heads * self.num_queries**2
        return 0

    def halved(self) -> 'NeighborhoodAttnCase':
        grid_size = halved_size(self.grid_size, least=self.kernel_size)
        return dataclasses.replace(self, grid_size=grid_size)


def sdpa_neighborhood_attn(
    case: NeighborhoodAttnCase, tensors: Mapping[str, Tensor]
) -> Tensor:
    """SDPA with a dense bias (1, Hq, N, N), minus infinity outside the windows."""
    rpb, size = tensors['rpb'], case.kernel_size
    height, width = case.grid_size
    steps = torch.arange(size, device=rpb.device)
    rows, cols = (
        window_start(side, size, 1, rpb.device)[:, None] + steps
        for side in (height, width)
    )
    offset_y = rows - torch.arange(height, device=rpb.device)[:, None] + size - 1
    offset_x = cols - torch.arange(width, device=rpb.device)[:, None] + size - 1
    # (H, 1, K, 1) and (1, W, 1, K): a window a query
    keys = rows[:, None, :, None] * width + cols[None, :, None, :]
    values = rpb[:, offset_y[:, None, :, None], offset_x[None, :, None, :]]
    keys = keys.reshape(1, case.num_queries, -1).expand(case.num_heads, -1, -1)
    dense = rpb.new_full((case.num_heads, case.num_queries, case.num_queries), -1e30)
    dense = dense.scatter(2, keys, values.flatten(3).flatten(1, 2))
    return sdpa_with_bias(tensors, dense.unsqueeze(0))


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
