"""Our deformable attention in the shapes of the deformable GQA repository's benchmark.

Its layer (AbelHutten/deformable-grouped-query-attention) keeps the head dimension
whatever the number of channels: 32 heads of 64 on 512 channels. Projections by offset
group, one group a head, a stride of 4 with an unpadded grid (one key on a 4 x 4 map)
and the offsets' range are the same here. What differs: the position bias is our table,
theirs an MLP, and offsets are normalised by a layer norm, as in DAT.
"""

import dataclasses
import functools

from torch import nn

from deform_gqa.models.layers import ChannelLayerNorm, DeformableGQA

from ..core.cases import Case, Workload
from ..core.kv_heads import Heads
from . import build
from .layer import module_workload
from .options import ModelOptions
from .report import model_case

NAME = 'deformable-gqa-paper'
HEADS, HEAD_DIM, CHANNELS = 32, 64, 512
GRID = (4, 4)
BATCH = 4096
CPU_BATCH, QUICK_BATCH = 64, 16  # the whole batch takes minutes on a CPU
STRIDE, OFFSET_KERNEL, OFFSET_RANGE = 4, 6, 4


class PublishedDeformableGQA(DeformableGQA):
    """(B, 512, H, W) -> (B, 512, H, W) with 32 query heads of 64 channels."""

    def __init__(self, num_kv_heads: int, backend: str = 'auto'):
        super().__init__(
            CHANNELS,
            HEADS,
            num_kv_heads=num_kv_heads,
            offset_groups=HEADS,
            stride=STRIDE,
            offset_kernel_size=OFFSET_KERNEL,
            offset_range_factor=OFFSET_RANGE,
            table_size=GRID,
            backend=backend,
        )
        inner, kv = HEADS * HEAD_DIM, num_kv_heads * HEAD_DIM
        self.proj_q = self._projection(CHANNELS, inner)
        self.proj_k = self._projection(CHANNELS, kv)
        self.proj_v = self._projection(CHANNELS, kv)
        self.proj_out = nn.Conv2d(inner, CHANNELS, 1)
        self.conv_offset = nn.Sequential(
            nn.Conv2d(
                HEAD_DIM,
                HEAD_DIM,
                OFFSET_KERNEL,
                STRIDE,
                (OFFSET_KERNEL - STRIDE) // 2,
                groups=HEAD_DIM,
            ),
            ChannelLayerNorm(HEAD_DIM),
            nn.GELU(),
            nn.Conv2d(HEAD_DIM, 2, 1, bias=False),
        )

    @staticmethod
    def _projection(channels: int, out: int) -> nn.Conv2d:
        return nn.Conv2d(channels, out, 1, groups=HEADS, bias=False)


def default_batch(options: ModelOptions, quick: bool) -> int:
    """That of the repository, less where it would take long."""
    if quick:
        return QUICK_BATCH
    return BATCH if options.device.type == 'cuda' else CPU_BATCH


def subject(batch: int) -> str:
    """The layer in words."""
    smaller = '' if batch == BATCH else f' (published: {BATCH})'
    height, width = GRID
    return (
        f'DeformableGQA, batch {batch}{smaller}, {CHANNELS} channels, '
        f'{height}x{width} map, {HEADS} heads of {HEAD_DIM}'
    )


def published_case(num_kv_heads: int, batch: int, options: ModelOptions) -> Case:
    """The layer with some of its kv heads."""
    name = f'{NAME}/b{batch}/kv{num_kv_heads}of{HEADS}'
    heads = Heads((HEADS,), (num_kv_heads,))
    make = functools.partial(build_workload, num_kv_heads, batch, options)
    case = model_case({'layer': NAME}, heads, batch, options, make, name)
    return dataclasses.replace(case, subject=subject(batch))


def build_workload(
    num_kv_heads: int, batch: int, options: ModelOptions, backend: str
) -> Workload:
    """The layer on a random map."""
    model = PublishedDeformableGQA(num_kv_heads).to(options.device)
    used = build.set_backend(model, backend, options)
    return module_workload(model, used, options, (batch, CHANNELS, *GRID))
