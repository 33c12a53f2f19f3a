"""Reference points, initial offsets, and an atlas that holds maps of several scales."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ring_offsets(groups: int, points: int) -> Tensor:
    """Initial offsets in pixels: (G, P, 2) in (x, y).

    Each offset group looks in a direction of its own. Point p is at a distance of p
    pixels, so that the first one is at the reference point itself.

    Source: Zhu et al., "Deformable DETR" (arXiv 2010.04159), whose points start at a
    distance of 1.
    """
    angle = torch.arange(groups) * (2 * math.pi / groups)
    direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    return direction[:, None] * torch.arange(points)[None, :, None]


def pixel_centres(size: tuple[int, int], like: Tensor) -> Tensor:
    """(H * W, 2) in (x, y), [0, 1] with align_corners=True; 1/2 where a side is 1."""
    rows, cols = (
        torch.linspace(0, 1, side, dtype=like.dtype, device=like.device)
        if side > 1
        else like.new_full((1,), 0.5)
        for side in size
    )
    y, x = torch.meshgrid(rows, cols, indexing='ij')
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def pixel_steps(size: tuple[int, int], like: Tensor) -> Tensor:
    """(2,) normalised length of one pixel in x and y; 0 where a side is 1."""
    return like.new_tensor([1 / (side - 1) if side > 1 else 0.0 for side in size[::-1]])


class Atlas:
    """Maps of several scales on one sheet, so that one softmax covers all of them.

    The first map is at the upper left, the others below each other to its right, with
    a row or column of zeros in between. Samples with zero padding are the same as
    from the maps themselves.

    Args:
        sizes: (H, W) of each map.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]):
        self.sizes = [tuple(size) for size in sizes]
        first, *rest = self.sizes
        self.corners = [(0, 0)]
        row = 0
        for height, _ in rest:
            self.corners.append((row, first[1] + 1))
            row += height + 1
        self.size = (
            max(first[0], row - 1),
            first[1] + (1 + max(w for _, w in rest) if rest else 0),
        )

    def pack(self, maps: Sequence[Tensor]) -> Tensor:
        """(..., H, W) of each size -> (..., height, width) of the sheet."""
        if len(maps) == 1:
            return maps[0]
        height, width = self.size
        return sum(
            F.pad(x, (col, width - col - size[1], row, height - row - size[0]))
            for x, size, (row, col) in zip(maps, self.sizes, self.corners, strict=True)
        )

    def coords(self, coords: Sequence[Tensor]) -> Tensor:
        """Coordinates (..., P, 2) on each map -> (..., maps * P, 2) on the sheet.

        Points more than a pixel outside their map are moved to that distance, where the
        map does not count any more, so that they do not read the next map.
        """
        if len(coords) == 1:
            return coords[0]
        placed = []
        for x, size, (row, col) in zip(coords, self.sizes, self.corners, strict=True):
            last = x.new_tensor([size[1] - 1, size[0] - 1])
            pixel = torch.minimum((x * last).clamp(min=-1), last + 1)
            sheet = x.new_tensor([max(side - 1, 1) for side in self.size[::-1]])
            placed.append((pixel + x.new_tensor([col, row])) / sheet)
        return torch.cat(placed, dim=-2)
