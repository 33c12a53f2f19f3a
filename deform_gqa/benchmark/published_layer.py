"""Our deformable attention in the shapes of the deformable GQA repository's benchmark.

Its layer (AbelHutten/deformable-grouped-query-attention) keeps the head dimension
whatever the number of channels: 32 heads of 64 on 512 channels. Projections by offset
group, one group a head, a stride of 4 with an unpadded grid (one key on a 4 x 4 map)
and the offsets' range are the same here. What differs: the position bias is our table,
theirs an MLP, and offsets are normalised by a layer norm, as in DAT.
"""

from torch import nn

from deform_gqa.models.layers import ChannelLayerNorm, DeformableGQA

HEADS, HEAD_DIM, CHANNELS = 32, 64, 512
GRID = (4, 4)
BATCH = 4096
CPU_BATCH = 64  # the whole batch takes minutes on a CPU
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
