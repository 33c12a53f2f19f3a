"""Drawn inputs shared by the tests of deform_sdpa."""

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclasses.dataclass
class DeformSdpaCase:
    """Shape of one call of deform_sdpa; notation of ``ops/naive.py``."""

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


@st.composite
def deform_sdpa_cases(draw, max_side: int = 9, max_queries: int = 20) -> DeformSdpaCase:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    divisors = [h for h in range(1, heads + 1) if heads % h == 0]
    return DeformSdpaCase(
        batch=draw(st.integers(1, 2)),
        query_views=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=draw(st.sampled_from(divisors)),
        groups=draw(st.sampled_from([None, *divisors])),
        queries=draw(st.integers(1, max_queries)),
        views=draw(st.integers(1, 3)),
        points=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from([3, 8, 16, 24, 32])),
        grid_size=draw(st.tuples(*[st.integers(1, max_side)] * 2)),
        margin=draw(st.sampled_from([0.0, 0.2, 2.0])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def small_sdpa_cases(draw) -> DeformSdpaCase:
    """Few programs and points, as the Triton interpreter is slow."""
    heads, kv_heads, groups = draw(
        st.sampled_from(
            [
                *((1, 1, None), (2, 1, None), (4, 1, None), (8, 1, 1), (3, 3, None)),
                *((6, 2, None), (4, 2, 2), (4, 1, 2), (3, 1, None), (2, 2, 1)),
                *((4, 2, 1), (2, 1, 2), (12, 1, None), (6, 2, 3)),
            ]
        )
    )
    return DeformSdpaCase(
        batch=draw(st.sampled_from([1, 1, 1, 2])),
        query_views=draw(st.sampled_from([1, 1, 1, 2])),
        heads=heads,
        kv_heads=kv_heads,
        groups=groups,
        queries=draw(st.integers(1, 30)),
        views=draw(st.integers(1, 2)),
        points=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([8, 13, 16, 24, 32, 40, 64])),
        grid_size=draw(st.tuples(*[st.integers(1, 9)] * 2)),
        margin=draw(st.sampled_from([0.0, 0.2, 2.0])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
