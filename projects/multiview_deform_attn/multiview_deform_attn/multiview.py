"""Cross-attention of a set of queries to maps of several views and scales."""

from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_int
from deform_gqa.models.layers.base_attention import BaseAttention, check_offset_groups
from deform_gqa.models.layers.sampling_points import pixel_steps, ring_offsets
from deform_gqa.ops import deform_sdpa

from .points import Atlas


@MODELS.register_module()
class MultiViewDeformableAttention(BaseAttention):
    """Queries attend to points near their reference points in every view and scale.

    One softmax covers all views, scales and points. A point outside its map has a
    logit of 0 and a value of 0: it has a share in the softmax and adds nothing to the
    output.

    The interface is not that of a block of the backbone: see :meth:`forward`.

    Args:
        dim: Number of channels C of queries and maps.
        num_heads: Query heads Hq; ``dim`` is a multiple.
        num_kv_heads: Key/value heads that divide ``num_heads``; None for
            ``num_heads``.
        num_levels: Number of scales of each view.
        num_points: Number of points of each query in each view and scale.
        offset_groups: Number of groups of query heads, each of which has its own
            points; divides ``num_heads``. None for one group per kv head.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).
        backend: Backend of :func:`deform_gqa.ops.deform_sdpa`.

    Raises:
        TypeError: For an option of another type.
        ValueError: For counts that do not divide, a rate out of range or an unknown
            backend; in ``forward`` for a query, maps or reference points whose shapes
            do not fit.

    Source: Zhu et al., "Deformable DETR" (arXiv 2010.04159) and Li et al., "BEVFormer"
    (arXiv 2203.17270), with attention weights from queries and keys instead of a
    linear layer.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        num_levels: int = 1,
        num_points: int = 4,
        offset_groups: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = 'auto',
    ):
        super().__init__(dim, num_heads, num_kv_heads, attn_drop, proj_drop, backend)
        groups = self.num_kv_heads if offset_groups is None else offset_groups
        check_offset_groups(num_heads, groups)
        for name, count in (('num_levels', num_levels), ('num_points', num_points)):
            check_int(name, count, 1)
        self.num_levels = num_levels
        self.offset_shape = (groups, num_levels, num_points, 2)
        self.offsets = nn.Linear(dim, groups * num_levels * num_points * 2)
        nn.init.zeros_(self.offsets.weight)
        first = ring_offsets(groups, num_points)[:, None].expand(self.offset_shape)
        with torch.no_grad():
            self.offsets.bias.copy_(first.flatten())
        self.proj_q = nn.Linear(dim, dim)
        self.proj_kv = nn.Conv2d(dim, 2 * self.kv_dim, 1)
        self.level_embed = nn.Parameter(torch.zeros(num_levels, dim))
        self.proj_out = nn.Linear(dim, dim)

    def forward(
        self, query: Tensor, maps: Sequence[Tensor], reference_points: Tensor
    ) -> Tensor:
        """
        Args:
            query: (B, N, C): the pixels of a view or of a bird's-eye grid, row by row,
                or object queries.
            maps: For each scale (B, V, C, H, W), or (B, C, H, W) for a single view.
            reference_points: (B, N, V, 2), the position of each query in each view, in
                (x, y), [0, 1] with align_corners=True, outside this range where the
                view does not show it; (B, N, 2) for a single view.

        Returns:
            (B, N, C), dtype of ``query``.
        """
        maps = [x.unsqueeze(1) if x.ndim == 4 else x for x in maps]
        if reference_points.ndim == 3:
            reference_points = reference_points.unsqueeze(2)
        self._check(query, maps, reference_points)
        atlas = Atlas([tuple(x.shape[3:]) for x in maps])
        k, v = atlas.pack([self._project(x, i) for i, x in enumerate(maps)]).chunk(
            2, dim=2
        )
        out = deform_sdpa(
            self.proj_q(query)
            .unflatten(2, (self.num_heads, -1))
            .transpose(1, 2)[:, None],
            self._pixels(k),
            self._pixels(v),
            self.sampling_coords(query, reference_points, atlas),
            grid_size=atlas.size,
            dropout_p=self.dropout_p,
            backend=self.backend,
        )
        return self.proj_drop(self.proj_out(out[:, 0].transpose(1, 2).flatten(2)))

    def _check(self, query, maps, reference_points) -> None:
        if len(maps) != self.num_levels:
            raise ValueError(
                f'maps must hold num_levels={self.num_levels} scales, got {len(maps)}'
            )
        if query.ndim != 3:
            raise ValueError(
                f'query must have shape (B, N, C), got {tuple(query.shape)}'
            )
        batch, num_queries, channels = query.shape
        views = maps[0].shape[1]
        if channels != self.dim:
            raise ValueError(f'query must have {self.dim} channels, got {channels}')
        for i, x in enumerate(maps):
            if tuple(x.shape[:3]) != (batch, views, self.dim):
                raise ValueError(
                    f'maps[{i}] must have shape (B, V, C, H, W) = '
                    f'{(batch, views, self.dim)} + (H, W), got {tuple(x.shape)}'
                )
        expected = (batch, num_queries, views, 2)
        if tuple(reference_points.shape) != expected:
            raise ValueError(
                f'reference_points must have shape (B, N, V, 2) = {expected}, got '
                f'{tuple(reference_points.shape)}'
            )

    def _project(self, x: Tensor, level: int) -> Tensor:
        """(B, V, C, H, W) -> (B, V, 2 * Hkv * D, H, W)."""
        batch_views = tuple(x.shape[:2])
        x = x.flatten(0, 1) + self.level_embed[level].to(x.dtype)[:, None, None]
        return self.proj_kv(x).unflatten(0, batch_views)

    def _pixels(self, x: Tensor) -> Tensor:
        """(B, V, Hkv * D, H, W) -> (B, V, Hkv, H * W, D)."""
        return x.flatten(3).unflatten(2, (self.num_kv_heads, -1)).transpose(3, 4)

    def sampling_coords(
        self, query: Tensor, reference_points: Tensor, atlas: Atlas
    ) -> Tensor:
        """Points on the atlas: (B, 1, G, N, V, levels * points, 2).

        float32 whatever the autocast dtype (float64 for float64 queries).
        """
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        # bf16 offsets would move a sample by up to a third of a pixel of a wide map.
        with torch.autocast(query.device.type, enabled=False):
            offset = self.offsets(query.to(self.offsets.weight.dtype)).to(dtype)
        # (B, G, N, levels, points, 2)
        offset = offset.unflatten(2, self.offset_shape).transpose(1, 2)
        # (B, 1, N, V, 1, 2)
        centres = reference_points.to(dtype)[:, None, :, :, None]
        levels = [
            centres + offset[:, :, :, i, None] * pixel_steps(size, offset)
            for i, size in enumerate(atlas.sizes)
        ]
        return atlas.coords(levels)[:, None]
