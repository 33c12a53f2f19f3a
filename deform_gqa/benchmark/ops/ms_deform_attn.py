"""ms_deform_attn in the shapes of Deformable DETR and DINO, and others' code for it.

Eight heads of 32 channels, four levels of stride 8 to 64, four points of each. The
queries of the encoder are all pixels, those of the decoder 300 (Deformable DETR) or 900
(DINO). Letters as in ``deform_gqa.ops``.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.fields import Fields, size_text
from ..core.kv_heads import kv_head_count, kv_head_counts
from . import mmcv_ms_deform, msda_triton
from .case import HEAD_DIM, Baseline, OpCase, Spec, halved_size, stage_map

HEADS, LEVELS, POINTS = 8, 4, 4
ENCODER = 'encoder'
DECODERS = (300, 900)
# Of the stages of a backbone: the second has stride 8.
_FINEST_STAGE = 2
# Pixels, standard deviation: how far samples lie from the query's own place.
_SPREAD = 3.0
# Of a pixel: keeps samples off the pixel centres, where gradients have kinks.
_MIN_FRACTION = 0.02
# The reference holds D values a pair, and several such tensors in float64.
_PAIR_COST = 4


@dataclasses.dataclass(frozen=True)
class MsDeformAttnCase(OpCase):
    """A call of an encoder or decoder; grid_size is the finest of the maps.

    Attributes:
        image_size: Of the images that the maps are of.
        decoder_queries: Queries of a decoder; None for an encoder.
    """

    op: ClassVar[str] = 'ms_deform_attn'
    coordinates: ClassVar[tuple[str, ...]] = ('sampling_locations',)
    sweep_options: ClassVar[tuple[str, ...]] = ('sizes',)
    baselines: ClassVar[dict[str, Baseline]] = {
        mmcv_ms_deform.NAME: mmcv_ms_deform.BASELINE,
        msda_triton.NAME: msda_triton.BASELINE,
    }
    # All of its products are the interpolation of values.
    products: ClassVar[tuple[int, int]] = (0, 0)
    sampled_maps: ClassVar[int] = 1
    has_softmax: ClassVar[bool] = False

    image_size: tuple[int, int]
    decoder_queries: int | None

    @property
    def part(self) -> str:
        """'encoder', or 'decoder' with the number of its queries."""
        return (
            ENCODER if self.decoder_queries is None else f'decoder {self.num_queries}'
        )

    @property
    def name(self) -> str:
        return (
            f'{self.op}/{size_text(self.image_size)}/{self.part.replace(" ", "")}'
            f'/b{self.batch}/kv{self.num_kv_heads}of{self.num_heads}'
        )

    @property
    def subject(self) -> str:
        return (
            f'{self.op}, {self.part}, {size_text(self.image_size)} px, '
            f'batch {self.batch}, {self.num_heads} heads of {self.head_dim}'
        )

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(H, W) of each level, half of the one before, rounded up."""
        sizes = [self.grid_size]
        while len(sizes) < LEVELS:
            sizes.append(halved_size(sizes[-1], least=1))
        return sizes

    @property
    def num_keys(self) -> int:
        return sum(map(math.prod, self.level_sizes))

    @property
    def num_queries(self) -> int:
        return self.num_keys if self.decoder_queries is None else self.decoder_queries

    @property
    def keys_per_query(self) -> int:
        """L * P samples."""
        return LEVELS * POINTS

    @property
    def samples(self) -> int:
        """Every head has its own, whatever the number of value heads."""
        return self.pairs

    def input_specs(self, dtype: torch.dtype) -> dict[str, Spec]:
        value = (self.batch, self.num_keys, self.num_kv_heads, self.head_dim)
        samples = (self.batch, self.num_queries, self.num_heads, LEVELS, POINTS)
        return {
            'value': (value, dtype),
            'sampling_locations': ((*samples, 2), torch.float32),
            'attention_weights': (samples, dtype),
        }

    def output_spec(self, dtype: torch.dtype) -> Spec:
        channels = self.num_heads * self.head_dim
        return (self.batch, self.num_queries, channels), dtype

    def options(self) -> dict[str, Any]:
        return {}

    def make_inputs(
        self, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> dict[str, Tensor]:
        """As a layer gives them: samples near their query, weights that sum to 1."""
        inputs = super().make_inputs(device, dtype, seed)
        sizes = torch.tensor(self.level_sizes, device=device)
        areas = sizes.prod(1)
        weights = inputs['attention_weights'].detach().float().flatten(3).softmax(-1)
        weights = weights.view_as(inputs['attention_weights']).to(dtype)
        offsets = inputs['sampling_locations'].detach()
        return {
            'value': inputs['value'],
            'spatial_shapes': sizes,
            'level_start_index': areas.cumsum(0) - areas,
            'sampling_locations': self._locations(offsets, sizes, seed),
            'attention_weights': weights.requires_grad_(),
        }

    def _locations(self, offsets: Tensor, sizes: Tensor, seed: int) -> Tensor:
        """Normal offsets, spread around the places of the queries."""
        widths_heights = sizes.flip(1)[:, None].float()
        pixels = self._places(offsets.device, seed) * widths_heights + _SPREAD * offsets
        corner = pixels.floor()
        fraction = (pixels - corner).clamp(_MIN_FRACTION, 1 - _MIN_FRACTION)
        pixels = corner + 0.5 + fraction  # pixel centres lie at the halves
        return (pixels / widths_heights).requires_grad_()

    def _places(self, device: torch.device, seed: int) -> Tensor:
        """(Q, 1, 1, 1, 2) in (x, y), [0, 1]: pixel centres, or anywhere."""
        if self.decoder_queries is not None:
            generator = torch.Generator(device).manual_seed(seed)
            places = torch.rand(
                self.decoder_queries, 2, generator=generator, device=device
            )
        else:
            places = torch.cat([_centres(size, device) for size in self.level_sizes])
        return places[:, None, None, None]

    def pair_values(self, backend: str) -> float:
        if backend in ('naive', mmcv_ms_deform.NAME):  # the sampled values
            return 3 * self.pairs * self.head_dim
        return 0

    def halved(self) -> 'MsDeformAttnCase':
        grid_size = halved_size(self.grid_size, least=2)
        return dataclasses.replace(self, grid_size=grid_size)

    def reduced(self, max_pairs: int) -> OpCase:
        return super().reduced(max_pairs // _PAIR_COST)

    @classmethod
    def fields(cls, described: Mapping[str, Any]) -> Fields:
        queries = described['decoder_queries']
        return {
            'part': ENCODER if queries is None else f'decoder {queries}',
            'image': size_text(described['image_size']),
            **super().fields(described),
        }

    @classmethod
    def select(cls, options) -> 'list[OpCase]':
        return cls.combinations(options.sizes, options.batch_sizes, options.kv_heads)

    @classmethod
    def combinations(
        cls,
        sizes: Sequence[tuple[int, int]],
        batch_sizes: Sequence[int],
        kv_heads: Sequence[str],
    ) -> 'list[OpCase]':
        """An encoder and two decoders of each size, batch and number of heads."""
        return [
            cls.at_size(size, queries, batch, count)
            for size in sizes
            for queries in (None, *DECODERS)
            for batch in batch_sizes
            for count in kv_head_counts(HEADS, kv_heads)
        ]

    @classmethod
    def at_size(
        cls, size: tuple[int, int], queries: int | None, batch: int, kv_heads: str | int
    ) -> 'MsDeformAttnCase':
        """kv heads as in ``kv_heads.kv_head_count``."""
        return cls(
            batch=batch,
            num_heads=HEADS,
            num_kv_heads=kv_head_count(HEADS, str(kv_heads)),
            head_dim=HEAD_DIM,
            grid_size=stage_map(size, _FINEST_STAGE),
            image_size=size,
            decoder_queries=queries,
        )

    @classmethod
    def for_sweep(cls, *, size: tuple[int, int], batch: int | None, **_: Any) -> OpCase:
        return cls.at_size(size, None, 1 if batch is None else batch, 'full')


def _centres(size: tuple[int, int], device: torch.device) -> Tensor:
    """(H * W, 2): those of all pixels of a map, row by row."""
    y, x = (
        (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side
        for side in size
    )
    return torch.stack(torch.meshgrid(x, y, indexing='xy'), -1).flatten(0, 1)
