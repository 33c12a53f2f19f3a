"""Deformable attention as its 1-D, 2-D and 3-D packages have it, with grouped heads.

``DeformableAttention2D`` has the arguments and the state_dict of
https://github.com/AbelHutten/deformable-grouped-query-attention; the other two are
those of its ancestor, https://github.com/lucidrains/deformable-attention. The official
block of DAT, with the fused kernel, is ``DeformableGQA``.

Positions on an axis of n cells run from -1 (the first) to 1 (the last), as with
``align_corners=True``. Sampling reads them as with ``align_corners=False``, where -1
and 1 are the outer edges of the map. That is how the packages do it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_bool, check_int, check_number, check_rate, describe
from deform_gqa.ops import deform_attn, deform_sample
from deform_gqa.ops.common import checks
from deform_gqa.ops.common.backends import check_backend

from .heads import split_heads
from .position_bias import attend_with_bias

PerAxis = int | tuple[int, ...]
# Points on each axis of a cell, at which bake_position_bias compares table and network.
CHECKS_PER_CELL = 4
# Displacements that the network works on at a time there.
BAKE_BLOCK = 2**16


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


class BakedBias(NamedTuple):
    """A position bias as a table, and what it is off by.

    Attributes:
        table: (Hq, Th, Tw), the ``rpb_table`` of :func:`deform_gqa.ops.deform_attn`.
        max_error: Largest difference between the table, interpolated, and the network.
    """

    table: Tensor
    max_error: float


class _DeformableAttention(nn.Module):
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
        values = _repeat(name, value, len(self.order))
        for side in values:
            check_int(name, side, 1)
        return values

    def _scales(self, scale: float | tuple[float, ...]) -> tuple[float, ...]:
        values = _repeat('offset_scale', scale, len(self.order))
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


class _BakeableAttention(_DeformableAttention):
    """The forms whose position bias fits a table of two axes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer('baked_table', None, persistent=False)
        # A table of other weights would go unnoticed.
        self.register_load_state_dict_post_hook(_drop_baked_bias)

    def train(self, mode: bool = True):
        """As for every module; training drops the baked bias."""
        if mode:
            self.baked_table = None
        return super().train(mode)

    @torch.no_grad()
    def bake_position_bias(
        self,
        resolution: int | tuple[int, int],
        map_size: tuple[int, ...] | None = None,
    ) -> BakedBias:
        """Turn the trained bias network into a table for the fused kernel.

        From then on ``forward`` calls :func:`deform_gqa.ops.deform_attn`, until the
        module is set to training or weights are loaded. The table spans displacements
        of -2 to 2, all that occur between two points of the map, at any map size. The
        bias of a key beyond the edge of the map is that of the nearest point on it.

        Args:
            resolution: (Th, Tw), or one number for both: cells of the table, odd so
                that one of them is the displacement 0; 2 H - 1 by 2 W - 1 has a cell
                for each distance of two pixels. In 1-D, one number.
            map_size: Size of a map. The error then includes keys that offsets of
                ``offset_scale`` move beyond its edge.

        Returns:
            The table, and the largest difference that was found when the table was
            compared with the network at 4 points a cell on each axis.

        Raises:
            TypeError: For a resolution or map size that is not made of integers.
            ValueError: For an even one, one below 3, a wrong number of sides, or a
                module in training mode.
        """
        if self.training:
            raise ValueError(
                'bake_position_bias needs a module in eval mode, got training=True'
            )
        sides = _repeat('resolution', resolution, len(self.order))
        for side in sides:
            check_int('resolution', side, 3)
            if side % 2 == 0:
                raise ValueError(f'resolution must be odd, got {resolution!r}')
        spans = self._overhang(map_size)
        table = self._bias_of([self._displacements(side) for side in sides])
        self.baked_table = table
        return BakedBias(table, self._largest_error(table, spans))

    def _displacements(self, points: int) -> Tensor:
        """As many from -2 to 2, all that occur between two points of the map."""
        weight = self.rel_pos_bias.mlp[-1].weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.linspace(-2, 2, points, dtype=dtype, device=weight.device)

    def _overhang(self, map_size: tuple[int, ...] | None) -> list[float]:
        """How far beyond the edge keys can be, on each axis of the map."""
        if map_size is None:
            return [0.0] * len(self.order)
        sides = _repeat('map_size', map_size, len(self.order))
        for side, step in zip(sides, self.downsample_factor, strict=True):
            check_int('map_size', side, step)
        conv = self.to_offsets[0]
        grid = [
            (side + 2 * pad - kernel) // step + 1
            for side, pad, kernel, step in zip(
                sides, conv.padding, conv.kernel_size, conv.stride, strict=True
            )
        ]
        spans = []
        for side, scale in zip(grid, self.offset_scale, strict=True):
            spans.append(2 * scale / max(side - 1, 1))
        return spans

    def _bias_of(self, displacements: Sequence[Tensor]) -> Tensor:
        """(Hq, Th, Tw): the network at all combinations; of one axis, Th is 1."""
        rows = _bias_rows(self.rel_pos_bias, displacements, self.order)
        return torch.cat(list(rows)).movedim(-1, 0).repeat(self.offset_groups, 1, 1)

    def _largest_error(self, table: Tensor, spans: Sequence[float]) -> float:
        """Over displacements on the map, and those that the edge cuts off."""
        heads = self.heads // self.offset_groups
        sides = table.shape[-len(spans) :]
        true, cut = [], []
        for side, span in zip(sides, spans, strict=True):
            inside = self._displacements((side - 1) * CHECKS_PER_CELL + 1)
            edges, beyond = [inside], [inside]
            for excess in (span / 2, span) if span else ():
                # Between any query and a key that lies beyond the far or near edge.
                beyond += [inside[inside <= 0] - excess, inside[inside >= 0] + excess]
                edges += [inside[inside <= 0], inside[inside >= 0]]
            true.append(torch.cat(beyond))
            cut.append(torch.cat(edges))
        read = _table_reader(table[:heads], cut)
        rows = _bias_rows(self.rel_pos_bias, true, self.order)
        errors, first = [], 0
        for block in rows:
            wanted = block.movedim(-1, 0)
            found = read(first, first + wanted.shape[1])
            errors.append((wanted - found).abs().max())
            first += wanted.shape[1]
        return torch.stack(errors).max().item()

    def _attend(self, q, k, v, pos, size) -> Tensor:
        if self.baked_table is None:
            return super()._attend(q, k, v, pos, size)
        pos = pos.clamp(-1, 1)
        # deform_attn has the query of an axis of one cell at 0, here it is at -1.
        pos = pos + pos.new_tensor([float(size[axis] == 1) for axis in self.order])
        pos = torch.stack([pos[..., self.order.index(a)] for a in range(len(size))], -1)
        if len(size) == 1:
            size, pos = (1, *size), F.pad(pos, (1, 0))
        return deform_attn(
            q,
            k,
            v,
            pos,
            self.baked_table,
            grid_size=size,
            pos_in_range=1 not in size,
            backend=self.backend,
        )


def _drop_baked_bias(module: _BakeableAttention, _) -> None:
    module.baked_table = None


def _bias_rows(
    network: nn.Module, displacements: Sequence[Tensor], order: Sequence[int]
) -> Iterator[Tensor]:
    """The network at all combinations of displacements, a block of rows at a time.

    Args:
        network: From displacements (..., A).
        displacements: Those on each axis of the map.
        order: The axis of the map for each channel of the network's input.

    Yields:
        (rows, Tw, Hq / G); of one axis a single row.
    """
    axes = list(displacements)
    first = axes.pop(0) if len(axes) == 2 else axes[0].new_zeros(1)
    [last] = axes
    for block in first.split(max(1, BAKE_BLOCK // len(last))):
        grid = torch.meshgrid(block, last, indexing='ij')[-len(order) :]
        bias = network(torch.stack([grid[axis] for axis in order], dim=-1))
        yield bias.to(first.dtype)


def _table_reader(
    table: Tensor, displacements: Sequence[Tensor]
) -> Callable[[int, int], Tensor]:
    """Rows a to b of the table, interpolated at all combinations of displacements."""
    at = [displacement / 2 for displacement in displacements]
    if len(at) == 1:
        at.insert(0, at[0].new_zeros(1))

    def read(a: int, b: int) -> Tensor:
        y, x = torch.meshgrid(at[0][a:b], at[1], indexing='ij')
        grid = torch.stack((x, y), dim=-1)[None]
        return F.grid_sample(table[None], grid, align_corners=True)[0]

    return read


@MODELS.register_module()
class DeformableAttention1D(_BakeableAttention):
    """Deformable attention of a sequence, (B, dim, N) -> (B, dim, N).

    Args:
        dim: Number of channels.
        dim_head: Channels of a head.
        heads: Query heads Hq.
        dropout: Dropout of the attention weights in training, in [0, 1).
        downsample_factor: Positions between the cells of the sampled grid.
        offset_scale: Largest offset, in cells; None for ``downsample_factor``.
        offset_groups: Number G of groups of channels and heads with samples of their
            own; None for ``heads``.
        offset_kernel_size: Kernel of the offset network.
        cpb_log_distance: Whether the bias network sees logarithms of displacements.
        group_queries: Whether the query projection is one for each offset group.
        group_key_values: Whether those of keys and values are.
        num_groups: Key/value heads Hkv; None for ``heads``.
        backend: Backend of ``deform_sample``, and of ``deform_attn`` if the bias is
            baked.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts that do not divide, a kernel that is smaller than
            ``downsample_factor`` or larger by an odd number, or a rate out of range.

    Source: https://github.com/lucidrains/deformable-attention.
    """

    conv = nn.Conv1d
    order = (0,)
    shape = 'B C N'

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        downsample_factor: int = 4,
        offset_scale: float | None = None,
        offset_groups: int | None = None,
        offset_kernel_size: int = 6,
        cpb_log_distance: bool = True,
        group_queries: bool = True,
        group_key_values: bool = True,
        num_groups: int | None = None,
        backend: str = 'auto',
    ):
        super().__init__(
            dim,
            dim_head,
            heads,
            num_groups,
            dropout,
            downsample_factor,
            offset_scale,
            offset_groups,
            offset_kernel_size,
            group_queries,
            group_key_values,
            cpb_log_distance,
            backend,
        )


@MODELS.register_module()
class DeformableAttention2D(_BakeableAttention):
    """Deformable grouped-query attention of a map, (B, dim, H, W) -> (B, dim, H, W).

    The state_dict is that of the published module, and so are outputs and gradients on
    square maps. On others, each axis has its own size here.

    Args:
        dim: Number of channels.
        dim_head: Channels of a head.
        heads: Query heads Hq.
        num_groups: Key/value heads Hkv; divides ``heads``.
        dropout: Dropout of the attention weights in training, in [0, 1).
        downsample_factor: Pixels between the cells of the sampled grid; one number or
            (height, width).
        offset_scale: Largest offset, in cells; None for ``downsample_factor``.
        offset_groups: Number G of groups of channels and heads with samples of their
            own; None for ``heads``.
        offset_kernel_size: Kernel of the offset network.
        group_queries: Whether the query projection is one for each offset group.
        group_key_values: Whether those of keys and values are.
        backend: Backend of ``deform_sample``, and of ``deform_attn`` if the bias is
            baked.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts that do not divide, a kernel that is smaller than
            ``downsample_factor`` or larger by an odd number, or a rate out of range.

    Source: https://github.com/AbelHutten/deformable-grouped-query-attention, after
    Xia et al. (arXiv 2201.00520) and Ainslie et al. (arXiv 2305.13245).
    """

    conv = nn.Conv2d
    order = (1, 0)
    shape = 'B C H W'

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        num_groups: int = 2,
        dropout: float = 0.0,
        downsample_factor: PerAxis = 4,
        offset_scale: float | tuple[float, float] | None = None,
        offset_groups: int | None = None,
        offset_kernel_size: PerAxis = 6,
        group_queries: bool = True,
        group_key_values: bool = True,
        backend: str = 'auto',
    ):
        super().__init__(
            dim,
            dim_head,
            heads,
            num_groups,
            dropout,
            downsample_factor,
            offset_scale,
            offset_groups,
            offset_kernel_size,
            group_queries,
            group_key_values,
            True,
            backend,
        )


@MODELS.register_module()
class DeformableAttention3D(_DeformableAttention):
    """Deformable attention of a video, (B, dim, T, H, W) -> (B, dim, T, H, W).

    The state_dict is that of the published module. Keys are sampled at their frame,
    height and width; the published one reads these as x, y and frame.

    Args:
        dim: Number of channels.
        dim_head: Channels of a head.
        heads: Query heads Hq.
        dropout: Dropout of the attention weights in training, in [0, 1).
        downsample_factor: Cells of the map between those of the sampled grid; one
            number or (frames, height, width).
        offset_scale: Largest offset, in cells; None for ``downsample_factor``.
        offset_groups: Number G of groups of channels and heads with samples of their
            own; None for ``heads``.
        offset_kernel_size: Kernel of the offset network.
        group_queries: Whether the query projection is one for each offset group.
        group_key_values: Whether those of keys and values are.
        num_groups: Key/value heads Hkv; None for ``heads``.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts that do not divide, a kernel that is smaller than
            ``downsample_factor`` or larger by an odd number, or a rate out of range.

    Source: https://github.com/lucidrains/deformable-attention.
    """

    conv = nn.Conv3d
    order = (0, 1, 2)
    shape = 'B C T H W'
    scale_is_stored = True

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        downsample_factor: PerAxis = 4,
        offset_scale: float | tuple[float, float, float] | None = None,
        offset_groups: int | None = None,
        offset_kernel_size: PerAxis = 6,
        group_queries: bool = True,
        group_key_values: bool = True,
        num_groups: int | None = None,
    ):
        super().__init__(
            dim,
            dim_head,
            heads,
            num_groups,
            dropout,
            downsample_factor,
            offset_scale,
            offset_groups,
            offset_kernel_size,
            group_queries,
            group_key_values,
            True,
            'auto',
        )


def _repeat(name: str, value: object, axes: int) -> tuple:
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
