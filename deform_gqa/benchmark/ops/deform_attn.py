"""deform_attn in the shapes of DAT-T++, and other people's ways to compute it.

FlexAttention differentiates tensors that its score function captures, but each may be
read at one point only: the four taps of a bilinear lookup need a copy each.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deform_gqa.ops.deform_attn.naive import interpolated_bias

from .baselines import flex_baseline, sdpa_with_bias
from .case import ARCH, Baseline, Spec, StageCase, halved_size

# Keeps positions off the edges, where the bias of tables of native size has kinks.
MAX_POSITION = 0.99


@dataclasses.dataclass(frozen=True)
class DeformAttnCase(StageCase):
    """Deformable attention; key_grid is the grid of the S sampled keys."""

    op: ClassVar[str] = 'deform_attn'
    letter: ClassVar[str] = 'D'
    coordinates: ClassVar[tuple[str, ...]] = ('pos',)
    baselines: ClassVar[dict[str, Baseline]] = {
        'sdpa-bias': Baseline(lambda case: functools.partial(sdpa_deform_attn, case)),
        'flex': flex_baseline(
            lambda case, attend: functools.partial(flex_deform_attn, case, attend)
        ),
    }

    offset_groups: int
    key_grid: tuple[int, int]
    table_size: tuple[int, int]

    @classmethod
    def own_fields(cls, stage: int, grid_size: tuple[int, int]) -> dict[str, Any]:
        stride = ARCH['strides'][stage - 1]
        table_side = 2 * ARCH['table_sizes'][stage - 1] - 1
        height, width = (math.ceil(side / stride) for side in grid_size)
        return dict(
            offset_groups=ARCH['offset_groups'][stage - 1],
            key_grid=(height, width),
            table_size=(table_side, table_side),
        )

    @property
    def keys_per_query(self) -> int:
        """S."""
        return math.prod(self.key_grid)

    def input_specs(self, dtype: torch.dtype) -> dict[str, Spec]:
        kv = (self.batch, self.num_kv_heads, self.keys_per_query, self.head_dim)
        return {
            'q': ((self.batch, self.num_heads, self.num_queries, self.head_dim), dtype),
            'k': (kv, dtype),
            'v': (kv, dtype),
            'pos': (
                (self.batch, self.offset_groups, self.keys_per_query, 2),
                torch.float32,
            ),
            'rpb_table': ((self.num_heads, *self.table_size), torch.float32),
        }

    def options(self) -> dict[str, Any]:
        return {'grid_size': self.grid_size, 'pos_in_range': True}

    def halved(self) -> 'DeformAttnCase':
        return dataclasses.replace(
            self,
            grid_size=halved_size(self.grid_size, least=2),
            key_grid=halved_size(self.key_grid, least=2),
        )

    def make_inputs(
        self, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> dict[str, Tensor]:
        inputs = super().make_inputs(device, dtype, seed)
        # Offsets of about one cell around a regular grid: the locality of real ones.
        axes = [torch.linspace(-1, 1, n, device=device) for n in self.key_grid]
        grid = torch.stack(torch.meshgrid(*axes, indexing='ij'), dim=-1).view(-1, 2)
        cell = torch.tensor([1 / n for n in self.key_grid], device=device)
        pos = grid + inputs['pos'].detach() * cell
        pos = pos.clamp(-MAX_POSITION, MAX_POSITION)
        return {**inputs, 'pos': pos.requires_grad_()}


def sdpa_deform_attn(case: DeformAttnCase, tensors: Mapping[str, Tensor]) -> Tensor:
    """SDPA with the interpolated bias (B, Hq, N, S) in memory."""
    bias = interpolated_bias(tensors['pos'], tensors['rpb_table'], case.grid_size)
    return sdpa_with_bias(tensors, bias)


def _tap(index: Tensor, size: int, pos: Tensor, table_size: int) -> Tensor:
    """Coordinate in the table padded by a cell of zeros, for a query and a key."""
    half = (table_size - 1) / 2
    query = index.to(torch.float32) * (half / (size - 1)) if size > 1 else half / 2
    return (query + half / 2 * (1 - pos) + 1).clamp(0, table_size + 1)


def flex_deform_attn(
    case: DeformAttnCase, attend, tensors: Mapping[str, Tensor]
) -> Tensor:
    """deform_attn by FlexAttention; ``attend`` is its (compiled) function."""
    return attend(
        *(tensors[name] for name in 'qkv'),
        score_mod=_score_mod(case, tensors['pos'], tensors['rpb_table']),
        enable_gqa=case.num_kv_heads != case.num_heads,
    )


def _score_mod(case: DeformAttnCase, pos: Tensor, rpb_table: Tensor):
    height, width = case.grid_size
    table_h, table_w = case.table_size
    group_size = case.num_heads // case.offset_groups
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
