"""Forms of deformable attention whose position bias can be baked into a table."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deform_gqa.checks import check_int
from deform_gqa.ops import deform_attn

from .deformable_base import DeformableAttentionBase, per_axis

# Points on each axis of a cell, at which bake_position_bias compares table and network.
CHECKS_PER_CELL = 4
# Displacements that the network works on at a time there.
BAKE_BLOCK = 2**16


class BakedBias(NamedTuple):
    """A position bias as a table, and what it is off by.

    Attributes:
        table: (Hq, Th, Tw), the ``rpb_table`` of :func:`deform_gqa.ops.deform_attn`.
        max_error: Largest difference between the table, interpolated, and the network.
    """

    table: Tensor
    max_error: float


class BakeableAttention(DeformableAttentionBase):
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
        sides = per_axis('resolution', resolution, len(self.order))
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
        sides = per_axis('map_size', map_size, len(self.order))
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


def _drop_baked_bias(module: BakeableAttention, _) -> None:
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
