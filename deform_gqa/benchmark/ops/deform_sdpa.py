"""The shapes at which deform_sdpa is measured: those of its published benchmark.

The benchmark of the public repository "Fused Deformable Scaled Dot-Product Multi-Head
Attention (Triton)": batch 2, head dim 32, V views that are queries and keys alike, on
maps of one size, points drawn evenly over the maps. Letters as in
``deform_gqa.ops``.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.fields import Fields, size_text
from ..core.kv_heads import kv_head_counts
from ..core.options import parse_count, parse_size, unique
from . import published_sdpa
from .case import HEAD_DIM, Baseline, OpCase, Spec, halved_size

# Of a cell: keeps points off the pixel centres, where gradients have kinks.
_MIN_FRACTION = 0.02
# The reference holds D values a pair, and several such tensors in float64.
_PAIR_COST = 4


@dataclasses.dataclass(frozen=True)
class DeformSdpaCase(OpCase):
    """Per-query samples; grid_size is the map of queries and keys."""

    op: ClassVar[str] = 'deform_sdpa'
    coordinates: ClassVar[tuple[str, ...]] = ('coords',)
    options_name: ClassVar[str | None] = 'sdpa'
    baselines: ClassVar[dict[str, Baseline]] = {
        published_sdpa.NAME: published_sdpa.BASELINE
    }

    views: int
    points: int

    @property
    def name(self) -> str:
        return (
            f'{self.op}/{size_text(self.grid_size)}/b{self.batch}'
            f'/kv{self.num_kv_heads}of{self.num_heads}/v{self.views}p{self.points}'
        )

    @property
    def subject(self) -> str:
        return (
            f'{self.op}, {size_text(self.grid_size)} maps, {self.views} views, '
            f'{self.points} points, batch {self.batch}, {self.num_heads} query heads '
            f'of {self.head_dim}'
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

    def pair_values(self, backend: str) -> float:
        if backend == 'naive':  # the sampled keys and values, with copies
            return self.pairs * self.head_dim * 4
        return 0

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

    @classmethod
    def fields(cls, described: Mapping[str, Any]) -> Fields:
        return {
            'map': size_text(described['grid_size']),
            'views': described['views'],
            'points': described['points'],
            **super().fields(described),
        }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        for name, text in _LISTS.items():
            kind = parse_size if name == 'maps' else parse_count
            text = f'{cls.op}: {text}'
            parser.add_argument(f'--{name}', nargs='+', type=kind, help=text)

    @classmethod
    def resolve_options(cls, args: argparse.Namespace) -> 'SdpaSweep':
        """The default sweep if no option sets a list of its own."""
        given: dict[str, Any] = {
            name: unique(getattr(args, name))
            for name in _LISTS
            if getattr(args, name) is not None
        }
        if given:
            given['with_ends'] = False
        if args.batch_sizes is not None:
            given['batch_sizes'] = unique(args.batch_sizes)
        return dataclasses.replace(
            QUICK_SWEEP if args.quick else DEFAULT_SWEEP, **given
        )

    @classmethod
    def select(cls, options) -> 'list[OpCase]':
        return sdpa_cases(options.own[cls.op], options.kv_heads)

    @classmethod
    def for_sweep(cls, *, batch: int | None, quick: bool, **_: Any) -> OpCase:
        shape = QUICK_GROUP_SWEEP if quick else GROUP_SWEEP
        if batch is not None:
            shape = dataclasses.replace(shape, batch_sizes=(batch,))
        return sdpa_cases(shape, ['full'])[0]


# Options of the op alone; without them its published inputs are measured.
_LISTS = {
    'maps': 'HxW of queries and keys (default: 18x18 14x14)',
    'heads': 'query heads (default: 32 8)',
    'views': 'of queries and of keys (default: 2 6, and 12 in one case)',
    'points': 'of a query in a view (default: 4 12, and 2 in one case)',
}


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
QUICK_GROUP_SWEEP = SdpaSweep(
    maps=((18, 18),), heads=(16,), views=(2,), points=(12,), batch_sizes=(1,)
)


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
