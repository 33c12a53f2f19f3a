"""An atlas that holds maps of several scales."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
