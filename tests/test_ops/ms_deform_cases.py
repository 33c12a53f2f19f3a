"""Inputs and comparisons shared by the tests of ms_deform_attn."""

import dataclasses
import itertools
import math

import torch
from hypothesis import strategies as st

from deform_gqa.ops import ms_deform_attn

# (x, y) in units of a map's size: edges, corners and centres of pixels, far outside
PLACES = torch.tensor([0.0, 1.0, 0.5, -0.25, 1.25, -40.0, 1e30])


@dataclasses.dataclass
class MsDeformCase:
    """Shape of one call; notation of ``ms_deform_attn``.

    Attributes:
        places: How the points lie: 'near' the map and in it, at 'pixels' (their
            centres, borders included), or at 'edges' and far outside.
    """

    batch: int = 2
    queries: int = 5
    heads: int = 4
    value_heads: int = 4
    points: int = 3
    dim: int = 6
    shapes: tuple[tuple[int, int], ...] = ((5, 7), (3, 4))
    places: str = 'near'
    strided: bool = False
    logits: bool = False
    shift: float = 0.0
    seed: int = 0

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """value, locations and weights, which all require gradients."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        keys = sum(height * width for height, width in self.shapes)
        value = normal(self.batch, keys, self.value_heads, self.dim)
        levels = len(self.shapes)
        samples = (self.batch, self.queries, self.heads, levels, self.points)
        weights = normal(*samples) + self.shift
        locations = self._locations(samples, generator)
        if dtype != torch.float64:
            locations = locations.float()
        inputs = [value.to(dtype), locations, weights.to(dtype)]
        return [self._lay_out(x) for x in inputs]

    def _locations(self, samples, generator):
        shape = (*samples, 2)
        if self.places == 'near':
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            return uniform * 1.6 - 0.3
        if self.places == 'edges':
            chosen = torch.randint(len(PLACES), shape, generator=generator)
            return PLACES[chosen].double()
        sizes = torch.tensor([(w, h) for h, w in self.shapes], dtype=torch.float64)
        sizes = sizes[:, None].clamp(min=1)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return ((uniform * (sizes + 2)).floor() - 0.5) / sizes

    def _lay_out(self, x):
        if self.strided:
            x = x.transpose(1, -1).contiguous().transpose(1, -1)
        return x.requires_grad_()

    def run(self, inputs, backend='auto', **options):
        """[out, gradients of all inputs] for a fixed upstream gradient."""
        value, locations, weights = inputs
        out = ms_deform_attn(
            value,
            [list(shape) for shape in self.shapes],
            None,
            locations,
            weights,
            logits=self.logits,
            backend=backend,
            **options,
        )
        return with_gradients(out, inputs)


def with_gradients(out, inputs):
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, inputs, grad_out.to(out))]


# Empty levels and single pixels among them
LEVEL = st.tuples(st.integers(0, 9), st.integers(0, 9)) | st.sampled_from(
    [(1, 1), (1, 8), (6, 1)]
)
# batch, value heads, heads that share one, levels, points
NUMBERS = list(
    itertools.product(range(1, 3), range(1, 4), range(1, 4), range(1, 5), range(1, 5))
)


def power_of_2(side):
    """At most ``side``: points on the pixels of such a map, where slopes change, are
    exact, however they are computed."""
    return 2 ** (side.bit_length() - 1) if side else 0


@st.composite
def drawn_cases(draw, max_queries=20, dims=(1, 3, 8, 33), max_product=1000):
    """``max_product`` bounds the product of NUMBERS, the samples for each query."""
    numbers = [x for x in NUMBERS if math.prod(x) <= max_product]
    batch, value_heads, group, levels, points = draw(st.sampled_from(numbers))
    places = draw(st.sampled_from(['near', 'pixels', 'edges']))
    shapes = draw(st.lists(LEVEL, min_size=levels, max_size=levels))
    if places == 'pixels':
        shapes = [(power_of_2(height), power_of_2(width)) for height, width in shapes]
    return MsDeformCase(
        batch=batch,
        queries=draw(st.integers(1, max_queries)),
        heads=value_heads * group,
        value_heads=value_heads,
        points=points,
        dim=draw(st.sampled_from(dims)),
        shapes=tuple(shapes),
        places=places,
        strided=draw(st.booleans()),
        logits=draw(st.booleans()),
        shift=draw(st.sampled_from([0.0, -300.0, 300.0])),
        seed=draw(st.integers(0, 2**16)),
    )
