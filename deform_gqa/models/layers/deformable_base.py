"""What the 1-D, 2-D and 3-D forms of deformable attention have in common.

Positions on an axis of n cells run from -1 (the first) to 1 (the last), as with
``align_corners=True``. Sampling reads them as with ``align_corners=False``, where -1
and 1 are the outer edges of the map. That is how the packages do it.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deform_gqa.checks import check_bool, check_int, check_number, check_rate, describe
from deform_gqa.ops import deform_sample
from deform_gqa.ops.common import checks
from deform_gqa.ops.common.backends import check_backend

from .heads import split_heads
from .position_bias import attend_with_bias

PerAxis = int | tuple[int, ...]


class Scale(nn.Module):
    """Offsets (B * G, A, ...) from (-1, 1) to cells of the sampled grid.

    Args:
        scale: Largest offset on each of the A axes.
        is_stored: Whether the state_dict holds it, as that of the 3-D package does.
    """

    def __init__(self, scale: Sequence[float], is_stored: bool):
        super().__init__()
        scale = torch.tensor(scale, dtype=torch.float32)
        self.register_buffer('scale', scale, persistent=is_stored)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(-1, *[1] * (x.ndim - 2))


class ContinuousPositionBias(nn.Module):
    """An MLP of the signed log displacement (Swin V2, arXiv 2111.09883).

    Args:
        axes: Number of axes A.
        hidden: Width of its two hidden layers.
        out: Heads of an offset group.
        log_distance: Whether to take the logarithm.
    """

    def __init__(self, axes: int, hidden: int, out: int, log_distance: bool = True):
        super().__init__()
        self.hidden = hidden
        self.log_distance = log_distance
        self.mlp = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(axes, hidden), nn.ReLU()),
                nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()),
                nn.Linear(hidden, out),
            ]
        )

    def forward(self, displacement: Tensor) -> Tensor:
        """(..., A), query less key, to (..., Hq / G)."""
        x = displacement.to(self.mlp[-1].weight.dtype)
        if self.log_distance:
            x = x.sign() * x.abs().log1p()
        for layer in self.mlp:
            x = layer(x)
        return x


class DeformableAttentionBase(nn.Module):
    """What the forms have in common; a subclass says on how many axes it works.

    Offsets and the displacements of the bias have their axes in an order of their own:
    ``order[c]`` is the axis of the map that channel c of them stands for.
    """

    conv: ClassVar[type[nn.Module]]
    order: ClassVar[tuple[int, ...]]
    shape: ClassVar[str]
    scale_is_stored: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        dim_head: int,
        heads: int,
        num_groups: int | None,
        dropout: float,
        downsample_factor: PerAxis,
        offset_scale: float | tuple[float, ...] | None,
        offset_groups: int | None,
        offset_kernel_size: PerAxis,
        group_queries: bool,
        group_key_values: bool,
        cpb_log_distance: bool,
        backend: str,
    ):
        super().__init__()
        num_groups = heads if num_groups is None else num_groups
        offset_groups = heads if offset_groups is None else offset_groups
        counts = dict(dim=dim, dim_head=dim_head, heads=heads, num_groups=num_groups)
        for name, value in {**counts, 'offset_groups': offset_groups}.items():
            check_int(name, value, 1)
        check_bool('group_queries', group_queries)
        check_bool('group_key_values', group_key_values)
        check_bool('cpb_log_distance', cpb_log_distance)
        check_rate('dropout', dropout)
        check_backend(backend)
        inner, inner_kv = dim_head * heads, dim_head * num_groups
        _check_multiple('heads', heads, 'num_groups', num_groups)
        _check_multiple('heads', heads, 'offset_groups', offset_groups)
        _check_multiple('dim', dim, 'offset_groups', offset_groups)
        if group_key_values:
            _check_multiple(
                'dim_head * num_groups', inner_kv, 'offset_groups', offset_groups
            )
        self.dim = dim
        self.heads = heads
        self.num_groups = num_groups
        self.offset_groups = offset_groups
        self.dropout = dropout
        self.backend = backend
        stride = self._per_axis('downsample_factor', downsample_factor)
        kernel = self._per_axis('offset_kernel_size', offset_kernel_size)
        if offset_scale is None:
            offset_scale = stride
        self.downsample_factor = stride
        self.offset_scale = self._scales(offset_scale)

        offset_dim = inner // offset_groups
        self.to_offsets = nn.Sequential(
            self.conv(
                offset_dim,
                offset_dim,
                kernel,
                stride,
                _paddings(kernel, stride),
                groups=offset_dim,
            ),
            nn.GELU(),
            self.conv(offset_dim, len(self.order), 1, bias=False),
            nn.Tanh(),
            Scale(
                [self.offset_scale[axis] for axis in self.order], self.scale_is_stored
            ),
        )
        self.rel_pos_bias = ContinuousPositionBias(
            len(self.order),
            max(dim // 4, 1),
            heads // offset_groups,
            cpb_log_distance,
        )
        groups_q = offset_groups if group_queries else 1
        groups_kv = offset_groups if group_key_values else 1
        self.to_q = self.conv(dim, inner, 1, groups=groups_q, bias=False)
        self.to_k = self.conv(dim, inner_kv, 1, groups=groups_kv, bias=False)
        self.to_v = self.conv(dim, inner_kv, 1, groups=groups_kv, bias=False)
        self.to_out = self.conv(inner, dim, 1)

    def _per_axis(self, name: str, value: PerAxis) -> tuple[int, ...]:
        values = per_axis(name, value, len(self.order))
        for side in values:
            check_int(name, side, 1)
        return values

    def _scales(self, scale: float | tuple[float, ...]) -> tuple[float, ...]:
        values = per_axis('offset_scale', scale, len(self.order))
        for side in values:
            check_number('offset_scale', side)
            if not 0 <= side < math.inf:
                raise ValueError(f'offset_scale must be finite, at least 0, got {side}')
        return values

    def forward(
        self, x: Tensor, return_vgrid: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of every cell of the map to the samples.

        Args:
            x: (B, dim, *map), a map of any size that is no smaller than a cell of the
                sampled grid.
            return_vgrid: Also return where keys were sampled.

        Returns:
            (B, dim, *map), and if asked for (B * G, A, *grid), in cells of the sampled
            grid, float32 whatever the autocast dtype: in (x, y) in 2-D, in (frame,
            height, width) in 3-D, and without the dimension of axes in 1-D.

        Raises:
            TypeError: If x is no floating tensor.
            ValueError: If it has another shape, or is too small.
        """
        self._check_input(x)
        size = tuple(x.shape[2:])
        q_map = self.to_q(x)
        vgrid = self._vgrid(q_map)
        pos = self._key_positions(vgrid)
        sampled = self._sample(x, pos)
        q = split_heads(q_map, self.heads)
        k = split_heads(self.to_k(sampled), self.num_groups)
        v = split_heads(self.to_v(sampled), self.num_groups)
        out = self._attend(q, k, v, pos, size)
        out = self.to_out(out.transpose(2, 3).flatten(1, 2).unflatten(2, size))
        if not return_vgrid:
            return out
        return out, vgrid.squeeze(1) if len(self.order) == 1 else vgrid

    def _check_input(self, x: Tensor) -> None:
        checks.check_tensor('x', x, self.shape)
        if x.shape[1] != self.dim:
            raise ValueError(
                f'x must have dim = {self.dim} channels, got {tuple(x.shape)}'
            )
        too_small = zip(x.shape[2:], self.downsample_factor, strict=True)
        if any(side < step for side, step in too_small):
            raise ValueError(
                f'the map {tuple(x.shape[2:])} is smaller than a cell of the sampled '
                f'grid (downsample_factor {self.downsample_factor})'
            )

    def _vgrid(self, q_map: Tensor) -> Tensor:
        """(B * G, A, *grid) positions of the keys in cells, axes in ``order``."""
        dtype = torch.float64 if q_map.dtype == torch.float64 else torch.float32
        grouped = q_map.unflatten(1, (self.offset_groups, -1)).flatten(0, 1)
        # bf16 offsets would move a sample by up to a third of a pixel of a wide map.
        with torch.autocast(q_map.device.type, enabled=False):
            offsets = self.to_offsets(grouped.to(self.to_q.weight.dtype)).to(dtype)
        cells = [
            torch.arange(side, dtype=dtype, device=offsets.device)
            for side in offsets.shape[2:]
        ]
        cells = torch.meshgrid(*cells, indexing='ij')
        return offsets + torch.stack([cells[axis] for axis in self.order])

    def _key_positions(self, vgrid: Tensor) -> Tensor:
        """(B, G, S, A), from -1 to 1 on the map and further beyond it."""
        sides = [vgrid.shape[2:][axis] for axis in self.order]
        steps = vgrid.new_tensor([2 / max(side - 1, 1) for side in sides])
        pos = vgrid.flatten(2).transpose(1, 2) * steps - 1
        return pos.unflatten(0, (-1, self.offset_groups))

    def _query_positions(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        """(N, A), likewise; -1 on an axis of one cell."""
        axes = [
            torch.arange(side, dtype=like.dtype, device=like.device)
            * (2 / max(side - 1, 1))
            - 1
            for side in size
        ]
        axes = torch.meshgrid(*axes, indexing='ij')
        return torch.stack([axes[axis] for axis in self.order], dim=-1).flatten(0, -2)

    def _sample(self, x: Tensor, pos: Tensor) -> Tensor:
        """(B, dim, *ones, S) samples of x, zero outside the map."""
        # In the order of the map's axes.
        pos = torch.stack(
            [pos[..., self.order.index(a)] for a in range(x.ndim - 2)], -1
        )
        if x.ndim == 5:
            return self._sample_volume(x, pos)
        if x.ndim == 3:  # a map of one row
            x, pos = x.unsqueeze(2), F.pad(pos, (1, 0))
        # From edges at -1 and 1 to the centres of the outer pixels there. A map of one
        # column has the same centre twice; a column of zeros changes nothing.
        size = x.shape[2:]
        padding = [max(2 - side, 0) for side in size]
        if any(padding):
            x = F.pad(x, (0, padding[1], 0, padding[0]))
        pixel = ((pos + 1) * pos.new_tensor(size) - 1) / 2
        pos = pixel * pos.new_tensor([2 / (side - 1) for side in x.shape[2:]]) - 1
        sampled = deform_sample(x, pos, backend=self.backend)
        return sampled.unflatten(2, (*[1] * (len(self.order) - 1), -1))

    def _sample_volume(self, x: Tensor, pos: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.offset_groups, -1)).flatten(0, 1)
        grid = pos.flip(-1).flatten(0, 1)[:, None, None]
        sampled = F.grid_sample(grouped.to(pos.dtype), grid, align_corners=False)
        return sampled.unflatten(0, pos.shape[:2]).flatten(1, 2).to(x.dtype)

    def _attend(self, q, k, v, pos, size) -> Tensor:
        """(B, heads, N, dim_head)."""
        return attend_with_bias(
            q,
            k,
            v,
            self._query_positions(size, pos),
            pos,
            self.rel_pos_bias,
            self.rel_pos_bias.hidden,
            self.dropout if self.training else 0.0,
        )


def per_axis(name: str, value: object, axes: int) -> tuple:
    """A value for each axis, from one for all or one for each.

    Raises:
        ValueError: For another number of values.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * axes
    if len(values) != axes:
        raise ValueError(
            f'{name} must be one number or one for each of the {axes} axes, '
            f'got {describe(value)}'
        )
    return values


def _paddings(kernel: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Those that give every cell of the sampled grid its pixels.

    Raises:
        ValueError: If they are no whole numbers from 0.
    """
    for side, step in zip(kernel, stride, strict=True):
        if side < step or (side - step) % 2:
            raise ValueError(
                f'offset_kernel_size must be downsample_factor plus an even number, '
                f'got {side} and {step}'
            )
    return tuple((side - step) // 2 for side, step in zip(kernel, stride, strict=True))


def _check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(
            f'{name} must be a multiple of {of}, got {value} and {divisor}'
        )
