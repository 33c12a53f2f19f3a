"""Inputs shared by the tests of deform_sdpa; needs nothing but torch."""

import dataclasses

import torch
from torch import Tensor

# A coordinate this close to a pixel's centre, in pixels, may be on either side of it
# in another precision, and bilinear interpolation has no derivative there.
MARGIN = 1e-3


@dataclasses.dataclass
class DeformSdpaCase:
    """Shape of one call of deform_sdpa; notation of ``ops/__init__.py``."""

    batch: int
    query_views: int
    heads: int
    kv_heads: int
    groups: int | None  # None: coords without the dimension of offset groups
    queries: int
    views: int
    points: int
    head_dim: int
    grid_size: tuple[int, int]
    margin: float  # coordinates lie in [-margin, 1 + margin]
    strided: bool
    seed: int

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """q, k, v and coords, all of which require gradients."""
        generator = torch.Generator().manual_seed(self.seed)
        pixels = self.grid_size[0] * self.grid_size[1]

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if self.strided:
                x = x.transpose(1, 4).contiguous().transpose(1, 4)
            return x.requires_grad_()

        q = draw(self.batch, self.query_views, self.heads, self.queries, self.head_dim)
        k = draw(self.batch, self.views, self.kv_heads, pixels, self.head_dim)
        v = draw(self.batch, self.views, self.kv_heads, pixels, self.head_dim)
        groups = () if self.groups is None else (self.groups,)
        shape = (
            *(self.batch, self.query_views, *groups),
            *(self.queries, self.views, self.points, 2),
        )
        coords = torch.rand(shape, generator=generator, dtype=torch.float64)
        coords = coords * (1 + 2 * self.margin) - self.margin
        if self.strided:
            coords = coords.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2)
        coords = coords.to(dtype if dtype == torch.float64 else torch.float32)
        return [q, k, v, coords.requires_grad_()]


def move_off_pixels(case: DeformSdpaCase, coords: Tensor) -> None:
    """Moves coordinates, in place, until none is within MARGIN of a pixel's centre."""
    with torch.no_grad():
        for axis, size in enumerate(reversed(case.grid_size)):
            at = coords[..., axis]
            near = (at * (size - 1)) - (at * (size - 1)).round()
            at.add_((near.abs() < MARGIN).to(at.dtype) * 2 * MARGIN)
