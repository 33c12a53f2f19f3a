"""The shapes at which deform_sdpa is measured: those of its published benchmark.

The benchmark of the public repository "Fused Deformable Scaled Dot-Product Multi-Head
Attention (Triton)": batch 2, head dim 32, V views that are queries and keys alike, on
maps of one size, points drawn evenly over the maps. Letters as in
``deform_gqa.ops.naive``.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .op_cases import HEAD_DIM, OpCase, Spec, halved_size, kv_head_counts

OP = 'deform_sdpa'
# Of a cell: keeps points off the pixel centres, where gradients have kinks.
_MIN_FRACTION = 0.02
# The reference holds D values a pair, and several such tensors in float64.
_PAIR_COST = 4


@dataclasses.dataclass(frozen=True)
class DeformSdpaCase(OpCase):
    """Per-query samples; grid_size is the map of queries and keys."""

    op: ClassVar[str] = OP

    views: int
    points: int

    @property
    def name(self) -> str:
        height, width = self.grid_size
        return (
            f'{self.op}/{height}x{width}/b{self.batch}'
            f'/kv{self.num_kv_heads}of{self.num_heads}/v{self.views}p{self.points}'
        )

    @property
    def num_queries(self) -> int:
        """Vq * N, with Vq = V."""
        return self.views * math.prod(self.grid_size)

    @property
    def keys_per_query(self) -> int:
        """V * P."""
        return self.views * self.points

    @property
    def samples(self) -> int:
        """One of a kv head serves all query heads of its group."""
        return self.pairs // self.num_heads * self.num_kv_heads

    def input_specs(self, dtype: torch.dtype) -> dict[str, Spec]:
        pixels = math.prod(self.grid_size)
        kv = (self.batch, self.views, self.num_kv_heads, pixels, self.head_dim)
        coords = (self.batch, self.views, pixels, self.views, self.points, 2)
        q = (self.batch, self.views, self.num_heads, pixels, self.head_dim)
        return {
            'q': (q, dtype),
            'k': (kv, dtype),
            'v': (kv, dtype),
            'coords': (coords, torch.float32),
        }

    def options(self) -> dict[str, Any]:
        return {'grid_size': self.grid_size}

    def halved(self) -> 'DeformSdpaCase':
        grid_size = halved_size(self.grid_size, least=2)
        return dataclasses.replace(self, grid_size=grid_size)

    def reduced(self, max_pairs: int) -> OpCase:
        return super().reduced(max_pairs // _PAIR_COST)

    def make_inputs(
        self, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> dict[str, Tensor]:
        inputs = super().make_inputs(device, dtype, seed)
        generator = torch.Generator(device).manual_seed(seed)
        shape = inputs['coords'].shape
        even = torch.rand(shape, generator=generator, device=device)
        height, width = self.grid_size
        cells = torch.tensor([width - 1, height - 1], device=device).clamp(min=1)
        pixel = even * cells
        fraction = pixel.frac().clamp(_MIN_FRACTION, 1 - _MIN_FRACTION)
        coords = (pixel.floor().minimum(cells - 1) + fraction) / cells
        return {**inputs, 'coords': coords.requires_grad_()}


@dataclasses.dataclass(frozen=True)
class SdpaSweep:
    """Which cases; every combination is one.

    Attributes:
        with_ends: Also the cases of MEMORY_SWEEP and, with all numbers of kv heads,
            of GROUP_SWEEP.
    """

    maps: tuple[tuple[int, int], ...] = ((18, 18), (14, 14))
    heads: tuple[int, ...] = (32, 8)
    views: tuple[int, ...] = (2, 6)
    points: tuple[int, ...] = (4, 12)
    batch_sizes: tuple[int, ...] = (2,)
    with_ends: bool = False


DEFAULT_SWEEP = SdpaSweep(with_ends=True)
QUICK_SWEEP = SdpaSweep(
    maps=((14, 14),), heads=(8,), views=(2,), points=(4,), batch_sizes=(1,)
)
# Shows what memory grows with.
MEMORY_SWEEP = SdpaSweep(maps=((14, 14),), heads=(8,), views=(2, 12), points=(2, 12))
GROUP_SWEEP = SdpaSweep(maps=((18, 18),), heads=(32,), views=(6,), points=(12,))


def sdpa_cases(sweep: SdpaSweep, kv_heads: Sequence[str]) -> list[DeformSdpaCase]:
    """Every case of a sweep once."""
    cases = [
        DeformSdpaCase(
            batch=batch,
            num_heads=heads,
            num_kv_heads=count,
            head_dim=HEAD_DIM,
            grid_size=grid_size,
            views=views,
            points=points,
        )
        for grid_size in sweep.maps
        for batch in sweep.batch_sizes
        for heads in sweep.heads
        for count in kv_head_counts(heads, kv_heads)
        for views in sweep.views
        for points in sweep.points
    ]
    if sweep.with_ends:
        for part, choice in ((MEMORY_SWEEP, 'full'), (GROUP_SWEEP, 'sweep')):
            part = dataclasses.replace(part, batch_sizes=sweep.batch_sizes)
            cases += sdpa_cases(part, (choice,))
    return list(dict.fromkeys(cases))
