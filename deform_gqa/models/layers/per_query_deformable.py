"""Per-query deformable attention: every query samples points of its own."""

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_int
from deform_gqa.ops import deform_sdpa

from .base_attention import BaseAttention, check_offset_groups
from .norm import ChannelLayerNorm
from .sampling_points import pixel_centres, pixel_steps, ring_offsets


@MODELS.register_module()
class PerQueryDeformableAttention(BaseAttention):
    """Self-attention to P points around each query, (B, C, H, W) -> (B, C, H, W).

    A depthwise convolution of the queries predicts, for each offset group, P offsets
    of every query; keys and values are projections of the whole map, sampled there.
    It can stand for any block letter of the DAT backbone:
    ``attention=dict(Q=dict(type='PerQueryDeformableAttention', num_points=8))``.

    Args:
        dim: Number of channels C.
        num_heads: Query heads Hq; ``dim`` is a multiple.
        num_kv_heads: Key/value heads that divide ``num_heads``; None for
            ``num_heads``.
        num_points: Number of points P of each query.
        offset_groups: Number of groups of query heads, each of which has its own
            points; divides ``num_heads``.
        offset_kernel_size: Side of the offset network's depthwise convolution, odd.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).
        backend: Backend of :func:`deform_gqa.ops.deform_sdpa`.

    Raises:
        TypeError: For an option of another type.
        ValueError: For counts that do not divide, no points, an even kernel, a rate
            out of range or an unknown backend.

    Source: the samples are per query as in Deformable DETR (arXiv 2010.04159), the
    offset network is that of DAT (arXiv 2201.00520).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        num_points: int = 8,
        offset_groups: int = 1,
        offset_kernel_size: int = 5,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = 'auto',
    ):
        super().__init__(dim, num_heads, num_kv_heads, attn_drop, proj_drop, backend)
        check_offset_groups(num_heads, offset_groups)
        check_int('num_points', num_points, 1)
        check_int('offset_kernel_size', offset_kernel_size, 1)
        if offset_kernel_size % 2 == 0:
            raise ValueError(
                f'offset_kernel_size must be odd, got {offset_kernel_size}'
            )
        self.num_points = num_points
        self.offset_groups = offset_groups
        group_dim = dim // offset_groups
        self.conv_offset = nn.Sequential(
            nn.Conv2d(
                group_dim,
                group_dim,
                offset_kernel_size,
                padding=offset_kernel_size // 2,
                groups=group_dim,
            ),
            ChannelLayerNorm(group_dim),
            nn.GELU(),
            nn.Conv2d(group_dim, 2 * num_points, 1, bias=False),
        )
        nn.init.normal_(self.conv_offset[-1].weight, std=1e-3)
        # The query's own pixel, and a ring around it.
        first = torch.zeros(num_points, 2)
        if num_points > 1:
            first[1:] = ring_offsets(num_points - 1, 2)[:, 1]
        # (G, P, 2) learnable offsets in pixels, the same for all queries
        self.base_offset = nn.Parameter(first.repeat(offset_groups, 1, 1))
        self.proj_q = nn.Conv2d(dim, dim, 1)
        self.proj_kv = nn.Conv2d(dim, 2 * self.kv_dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        q_map = self.proj_q(x)
        # (B, 1, h, H * W, D), channels side by side
        q, kv = (
            t.flatten(2).transpose(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)
            for t, heads in (
                (q_map, self.num_heads),
                (self.proj_kv(x), 2 * self.num_kv_heads),
            )
        )
        k, v = kv.unsqueeze(1).chunk(2, dim=2)
        out = deform_sdpa(
            q.unsqueeze(1),
            k,
            v,
            self.sampling_coords(q_map),
            grid_size=size,
            dropout_p=self.dropout_p,
            backend=self.backend,
        )
        out = out.squeeze(1).transpose(2, 3).flatten(1, 2).unflatten(2, size)
        return self.proj_drop(self.proj_out(out))

    def sampling_coords(self, q_map: Tensor) -> Tensor:
        """Points of each query: (B, 1, G, H * W, 1, P, 2) in (x, y), [0, 1].

        Args:
            q_map: (B, C, H, W), the projected queries.

        Returns:
            float32 whatever the autocast dtype (float64 for float64 queries).
        """
        dtype = torch.float64 if q_map.dtype == torch.float64 else torch.float32
        groups = q_map.unflatten(1, (self.offset_groups, -1)).flatten(0, 1)
        # bf16 offsets would move a sample by up to a third of a pixel of a wide map.
        with torch.autocast(q_map.device.type, enabled=False):
            weight = self.conv_offset[0].weight
            offset = self.conv_offset(groups.to(weight.dtype)).to(dtype)
        # (B, G, H * W, P, 2)
        offset = offset.flatten(2).transpose(1, 2)
        offset = offset.unflatten(2, (self.num_points, 2))
        offset = offset.unflatten(0, (-1, self.offset_groups))
        offset = offset + self.base_offset.to(dtype)[:, None]
        size = tuple(q_map.shape[2:])
        centres = pixel_centres(size, offset)[:, None]
        coords = centres + offset * pixel_steps(size, offset)
        return coords[:, None, :, :, None]
