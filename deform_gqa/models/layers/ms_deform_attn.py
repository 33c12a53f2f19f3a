"""Multi-scale deformable attention, in the place of mmcv's module."""

import math
from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModule, constant_init, xavier_init
from torch import Tensor, nn

from deform_gqa import checks
from deform_gqa.ops import ms_deform_attn
from deform_gqa.ops.common.backends import check_backend
from deform_gqa.ops.ms_deform_attn.levels import shapes_tensor


@MODELS.register_module()
class MSDeformAttn(BaseModule):
    """Drop-in for ``mmcv.ops.MultiScaleDeformableAttention``, by our op.

    With ``num_value_heads`` left at None its state_dict, its initialisation and its
    outputs are those of mmcv's module. Locations are float32 under every autocast, and
    the softmax over levels and points is part of the op.

    Args:
        embed_dims: Channels of queries, values and output.
        num_heads: Heads M; must divide embed_dims.
        num_levels: Maps L.
        num_points: Points P of each level.
        im2col_step: Not used; mmcv's configs name it.
        dropout: Rate of the dropout before the identity is added.
        batch_first: Tensors are (B, N, C), not (N, B, C).
        norm_cfg: Not used; mmcv's module only keeps it.
        init_cfg: See ``mmengine.model.BaseModule``.
        value_proj_ratio: Channels of the projected values over embed_dims.
        num_value_heads: Heads of the values, Mv; must divide num_heads. None stands for
            num_heads. Fewer make ``value_proj`` smaller in proportion.
        backend: 'auto', 'naive', 'torch' or 'triton'.

    Raises:
        ValueError: For numbers that do not divide, or an unknown backend.
        TypeError: For a number that is none.

    Source: Deformable DETR (arXiv 2010.04159) and mmcv.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
        value_proj_ratio: float = 1.0,
        num_value_heads: int | None = None,
        backend: str = 'auto',
    ):
        super().__init__(init_cfg)
        if num_value_heads is None:
            num_value_heads = num_heads
        numbers = dict(
            embed_dims=embed_dims,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            num_value_heads=num_value_heads,
        )
        for name, number in numbers.items():
            checks.check_int(name, number)
            if number < 1:
                raise ValueError(f'{name} must be at least 1, got {number}')
        checks.check_number('value_proj_ratio', value_proj_ratio)
        if not 0 < value_proj_ratio < math.inf:
            raise ValueError(
                f'value_proj_ratio must be positive, got {value_proj_ratio}'
            )
        channels = int(embed_dims * value_proj_ratio)
        for name, number in (('embed_dims', embed_dims), ('value channels', channels)):
            if number == 0 or number % num_heads:
                raise ValueError(
                    f'{name} ({number}) must be a positive multiple of '
                    f'num_heads ({num_heads})'
                )
        if num_heads % num_value_heads:
            raise ValueError(
                f'num_heads ({num_heads}) must be a multiple of num_value_heads '
                f'({num_value_heads})'
            )
        checks.check_rate('dropout', dropout)
        check_backend(backend)
        self.embed_dims, self.num_heads = embed_dims, num_heads
        self.num_levels, self.num_points = num_levels, num_points
        self.num_value_heads, self.backend = num_value_heads, backend
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dims, samples * 2)
        self.attention_weights = nn.Linear(embed_dims, samples)
        value_channels = channels // num_heads * num_value_heads
        self.value_proj = nn.Linear(embed_dims, value_channels)
        self.output_proj = nn.Linear(channels, embed_dims)
        self.init_weights()

    def init_weights(self) -> None:
        """Points of head m lie in its direction, 1 to P pixels away."""
        constant_init(self.sampling_offsets, 0.0)
        bias = self.sampling_offsets.bias
        angles = torch.arange(self.num_heads, dtype=torch.float32, device=bias.device)
        angles = angles * (2.0 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True)[0]
        steps = torch.arange(1, self.num_points + 1, device=bias.device)
        offsets = directions[:, None, None] * steps[:, None]
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        bias.data = offsets.reshape(-1).to(bias.dtype)
        constant_init(self.attention_weights, val=0.0, bias=0.0)
        xavier_init(self.value_proj, distribution='uniform', bias=0.0)
        xavier_init(self.output_proj, distribution='uniform', bias=0.0)
        self._is_init = True

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | Sequence[Sequence[int]] | None = None,
        level_start_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """The attention of ``query`` to ``value``, added to ``identity``.

        Args:
            query: (N, B, C), or (B, N, C) with ``batch_first``.
            key: Not used, as in mmcv.
            value: (S, B, C), or (B, S, C); None stands for query.
            identity: As query; None stands for query.
            query_pos: As query, added to it.
            key_padding_mask: (B, S), True where there is padding.
            reference_points: (B, N, L, 2) in (x, y), [0, 1]; or (B, N, L, 4) with
                the (w, h) of boxes, in whose halves offsets are then measured.
            spatial_shapes: (L, 2), the (H, W) of each level, or a list of pairs.
            level_start_index: (L,), or None.
            kwargs: ``residual`` is mmcv's older name of ``identity``. All else is not
                used; layers of mmdet pass more.

        Raises:
            TypeError: For spatial_shapes or reference_points of a wrong type, or None.
            ValueError: For another number of levels than num_levels, for reference
                points that have neither 2 nor 4 numbers or do not fit, and for what
                :func:`deform_gqa.ops.ms_deform_attn` does not take.
        """
        value = query if value is None else value
        identity = kwargs.get('residual') if identity is None else identity
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        heads = (self.num_heads, self.num_levels, self.num_points)
        out = ms_deform_attn(
            value.unflatten(2, (self.num_value_heads, -1)),
            spatial_shapes,
            level_start_index,
            self.sampling_locations(
                query, reference_points, spatial_shapes, value.dtype
            ),
            self.attention_weights(query).unflatten(2, heads),
            logits=True,
            backend=self.backend,
        )
        out = self.output_proj(out)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return self.dropout(out) + identity

    def sampling_locations(
        self,
        query: Tensor,
        reference_points: Tensor,
        spatial_shapes: Tensor | Sequence[Sequence[int]],
        dtype: torch.dtype,
    ) -> Tensor:
        """Where the values are sampled: (B, N, M, L, P, 2) in (x, y), [0, 1] in a map.

        In float32 at least, whatever ``dtype`` and autocast say.

        Args:
            query: (B, N, C), with its position.
            reference_points: As in ``forward``.
            spatial_shapes: (L, 2), the (H, W) of each level, or a list of pairs.
        """
        sizes = shapes_tensor(spatial_shapes).to(query.device, non_blocking=True)
        if sizes.shape[0] != self.num_levels:
            raise ValueError(
                f'spatial_shapes must have num_levels ({self.num_levels}) levels, '
                f'got {sizes.shape[0]}'
            )
        _check_reference_points(query, reference_points, self.num_levels)
        dtype = torch.promote_types(dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            offsets = torch.nn.functional.linear(
                query.to(dtype),
                self.sampling_offsets.weight.to(dtype),
                self.sampling_offsets.bias.to(dtype),
            ).unflatten(2, (self.num_heads, self.num_levels, self.num_points, 2))
            points = reference_points.to(dtype)[:, :, None, :, None]
            if points.shape[-1] == 2:
                # An empty level has no samples, whose offsets are then 0 / 0
                return points + offsets / sizes.flip(-1).clamp(min=1)[:, None]
            halves = points[..., 2:] * (0.5 / self.num_points)
            return points[..., :2] + offsets * halves


def _check_reference_points(query: Tensor, points: Tensor, num_levels: int) -> None:
    """Dimensions of size 1 are repeated."""
    if not isinstance(points, Tensor):
        raise TypeError(
            f'reference_points must be a tensor, got {type(points).__name__}'
        )
    if points.shape[-1] not in (2, 4):
        raise ValueError(
            'reference_points must have 2 or 4 numbers, '
            f'got shape {tuple(points.shape)}'
        )
    expected = (*query.shape[:2], num_levels)
    if points.ndim != 4 or any(
        x != 1 and x != y for x, y in zip(points.shape, expected, strict=False)
    ):
        raise ValueError(
            f'reference_points must have shape (B, N, L, 2 or 4) with (B, N, L) = '
            f'{expected}, got {tuple(points.shape)}'
        )
