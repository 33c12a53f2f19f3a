"""ms_deform_attn on tiles of queries: definition in ``naive.py``.

The values of a head are copied into maps with a border of zeros, so that every
sample that counts has four pixels and no mask. A query's output is then a weighted sum
of L * P * 4 rows, an embedding bag. Backward needs the products of these rows with
the query's gradient, one for each pixel; from them follow the gradients of weights and
locations. The gradient of the maps is an embedding bag as well, once the samples are
sorted by pixel: the same sum in the same order each time.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .levels import check_levels

# Samples of a tile: few stay in cache; more, in backward, share the sums over the maps.
SAMPLES_FORWARD, SAMPLES_BACKWARD = 2**17, 2**19
# Pixels around a map. Left and right of it are the end of a row and the begin of the
# next one.
BORDER = 2


class Level(NamedTuple):
    """One map: its size, its first key, and its first row among the bordered maps."""

    height: int
    width: int
    start: int
    first: int

    @property
    def keys(self) -> slice:
        return slice(self.start, self.start + self.height * self.width)

    @property
    def row_stride(self) -> int:
        return self.width + BORDER

    @property
    def rows(self) -> slice:
        """All of the bordered map."""
        count = (self.height + 2 * BORDER) * self.row_stride + BORDER
        return slice(self.first, self.first + count)

    @property
    def origin(self) -> int:
        """The row of the first pixel."""
        return self.first + BORDER * self.row_stride + BORDER

    def inside(self, maps: Tensor) -> Tensor:
        """(S', D) -> the view (H, W, D) of this map without its border."""
        begin = self.first + BORDER * self.row_stride
        rows = maps[begin : begin + self.height * self.row_stride]
        return rows.unflatten(0, (self.height, self.row_stride))[:, BORDER:]


def _make_levels(shapes: Tensor, starts: Tensor, num_keys: int) -> list[Level]:
    levels, first = [], 0
    for size in check_levels(shapes.tolist(), starts.tolist(), num_keys):
        levels.append(Level(*size, first))
        first = levels[-1].rows.stop
    return levels


class Samples(NamedTuple):
    """The samples of n bags (queries and heads), E = L * P each.

    Attributes:
        upper, lower: (n, E) rows, in the bordered maps, of the left pixels; the right
            ones are next to them. int32.
        right, down: (n, E) position between the pixels, in [0, 1).
        weights: (n, E) normalised.
        corners: Four of (n, E), weights times the bilinear ones: upper left, upper
            right, lower left, lower right.
    """

    upper: Tensor
    lower: Tensor
    right: Tensor
    down: Tensor
    weights: Tensor
    corners: tuple[Tensor, Tensor, Tensor, Tensor]


class _Call:
    """The tensors of a call and the geometry of its maps."""

    def __init__(self, value, shapes, starts, locations, weights, logits):
        self.value, self.locations, self.weights = value, locations, weights
        self.logits, self.dtype = logits, locations.dtype
        self.batch, num_keys, self.value_heads, self.dim = value.shape
        self.num_queries, heads, _, points = locations.shape[1:5]
        self.group = heads // self.value_heads
        self.samples_of_query = self.group * len(shapes) * points
        self.levels = _make_levels(shapes, starts, num_keys)
        # One number for each sample of a bag: sums and products with a row of E
        # numbers are fast where those with one number for a level are not.
        numbers = [
            (level.width, level.height, level.row_stride, level.origin)
            for level in self.levels
            for _ in range(points)
        ]
        widths, heights, strides, origins = zip(*numbers, strict=True)
        self.sizes = self._row(sum(zip(widths, heights, strict=True), ()), self.dtype)
        self.strides = self._row(strides, torch.int32)
        self.origins = self._row(origins, torch.int32)

    def _row(self, numbers: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=self.value.device)

    @property
    def is_empty(self) -> bool:
        return 0 in self.value.shape[:2] or self.num_queries == 0

    def new_maps(self) -> Tensor:
        """(S', D) zeros for the maps of one head."""
        return self.value.new_zeros(
            (self.levels[-1].rows.stop, self.dim), dtype=self.dtype
        )

    def fill_maps(self, maps: Tensor, image: int, head: int) -> None:
        """Copies the values of a head into its bordered maps."""
        pixels = self.value[image, :, head]
        for level in self.levels:
            inside = level.inside(maps)
            inside.copy_(pixels[level.keys].view(inside.shape))

    def tiles(self, most: int, block: slice | None = None) -> Iterator[slice]:
        """Slices of a block of queries, or of all, with about ``most`` samples each."""
        begin, end = (block.start, block.stop) if block else (0, self.num_queries)
        size = max(1, most // self.samples_of_query)
        for first in range(begin, end, size):
            yield slice(first, min(first + size, end))

    def heads_of(self, value_head: int) -> slice:
        return slice(value_head * self.group, (value_head + 1) * self.group)

    def sample(self, image: int, queries: slice, heads: slice) -> Samples:
        # (n, E * 2) in (x, y), in pixels
        at = self.locations[image, queries, heads].flatten(2).flatten(0, 1)
        at = (at * self.sizes).sub_(0.5)
        # Far outside is as good as outside, and so is what is no number.
        at.nan_to_num_(nan=-BORDER).clamp_(min=-BORDER)
        torch.minimum(at, self.sizes, out=at)
        floor = at.floor()
        right, down = (x.contiguous() for x in _by_axis(at.sub_(floor)))
        x, y = (x.to(torch.int32) for x in _by_axis(floor))
        upper = y.mul_(self.strides).add_(self.origins).add_(x)
        weights = self.weights[image, queries, heads].flatten(2).flatten(0, 1)
        weights = weights.to(self.dtype)
        if self.logits:
            weights = weights.softmax(-1)
        below = weights * down
        above = weights - below
        lower_right, upper_right = below * right, above * right
        return Samples(
            upper,
            upper + self.strides,
            right,
            down,
            weights,
            (
                above.sub_(upper_right),
                upper_right,
                below.sub_(lower_right),
                lower_right,
            ),
        )


def _by_axis(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, E * 2) -> those of x and of y, (n, E) each."""
    return x.unflatten(1, (-1, 2)).unbind(2)


def ms_deform_attn_forward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    logits: bool,
) -> Tensor:
    """Returns (B, Q, M * D), dtype of value."""
    call = _Call(value, shapes, starts, locations, weights, logits)
    heads = locations.shape[2]
    out = value.new_empty(call.batch, call.num_queries, heads, call.dim)
    if call.is_empty:
        return out.zero_().flatten(2)
    maps = call.new_maps()
    for image in range(call.batch):
        for value_head in range(call.value_heads):
            call.fill_maps(maps, image, value_head)
            heads = call.heads_of(value_head)
            for queries in call.tiles(SAMPLES_FORWARD):
                samples = call.sample(image, queries, heads)
                sums = sum(
                    F.embedding_bag(
                        index, pixels, mode='sum', per_sample_weights=weights
                    )
                    for (index, pixels), weights in zip(
                        _corner_rows(samples, maps), samples.corners, strict=True
                    )
                )
                part = out[image, queries, heads]
                part.copy_(sums.view(part.shape))
    return out.flatten(2)


def ms_deform_attn_backward(
    grad_out: Tensor,
    out: Tensor,
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, in their dtypes, contiguous."""
    call = _Call(value, shapes, starts, locations, weights, logits)
    grads = [
        torch.zeros_like(x, memory_format=torch.contiguous_format)
        for x in (value, locations, weights)
    ]
    if call.is_empty:
        return tuple(grads)
    grad_value, grad_locations, grad_weights = grads
    grad_out = grad_out.unflatten(2, (-1, call.dim))
    maps, grad_maps = call.new_maps(), call.new_maps()
    for image in range(call.batch):
        for value_head in range(call.value_heads):
            call.fill_maps(maps, image, value_head)
            grad_maps.zero_()
            heads = call.heads_of(value_head)
            for block in call.tiles(SAMPLES_BACKWARD):
                parts, grad = [], grad_out[image, block, heads]
                grad = grad.flatten(0, 1).to(call.dtype)
                for queries in call.tiles(SAMPLES_FORWARD, block):
                    samples = call.sample(image, queries, heads)
                    begin = (queries.start - block.start) * call.group
                    by_location, by_weight = _gradients(
                        call, samples, maps, grad[begin:][: len(samples.upper)]
                    )
                    part = grad_locations[image, queries, heads]
                    part.copy_(by_location.view(part.shape))
                    part = grad_weights[image, queries, heads]
                    part.copy_(by_weight.view(part.shape))
                    parts.append((samples.upper, samples.lower, *samples.corners))
                _scatter(parts, grad, grad_maps)
            for level in call.levels:
                inside = level.inside(grad_maps)
                part = grad_value[image, level.keys, value_head]
                part.copy_(inside.reshape(part.shape))
    return tuple(grads)


def _corner_rows(samples: Samples, maps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each corner the index (n, E), and the rows (.., D) that it belongs to."""
    for index in (samples.upper, samples.lower):
        yield index, maps
        yield index, maps[1:]


def row_products(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """rows (.., D) at index (n, E), times x (n, D) -> (n, E)."""
    on_cpu = rows.device.type == 'cpu'
    return (sparse_products if on_cpu else gathered_products)(rows, index, x)


def gathered_products(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(rows[index.long()], x.unsqueeze(-1)).squeeze(-1)


def sparse_products(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """As some elements of the matrix ``x @ rows.T``: a CPU gathers no rows for it."""
    _announce_sparse_tensors()
    count, length = index.shape
    sampled = _csr_tensor(
        torch.arange(0, (count + 1) * length, length, dtype=index.dtype),
        index.flatten(),
        rows.new_zeros(index.numel()),
        (count, rows.shape[0]),
    )
    products = torch.sparse.sampled_addmm(sampled, x, rows.t(), beta=0.0)
    return products.values().view(index.shape)


# Columns are neither sorted nor distinct, which the product does not need.
_csr_tensor = functools.partial(torch.sparse_csr_tensor, check_invariants=False)


@functools.cache
def _announce_sparse_tensors() -> None:
    """torch warns at the first of these tensors that they are in beta state."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Sparse CSR', UserWarning)
        _csr_tensor(torch.tensor([0, 0]), torch.tensor([]).long(), [], (1, 1))


def _gradients(
    call: _Call, samples: Samples, maps: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of locations (n, E, 2) and of weights (n, E), from that of out (n, D)."""
    upper_left, upper_right, lower_left, lower_right = (
        row_products(rows, index, grad) for index, rows in _corner_rows(samples, maps)
    )
    slope_above = upper_right.sub_(upper_left)
    slope_below = lower_right.sub_(lower_left)
    above = upper_left.addcmul_(samples.right, slope_above)
    slope_y = lower_left.addcmul_(samples.right, slope_below).sub_(above)
    by_weight = above.addcmul_(samples.down, slope_y)
    slope_x = slope_above.addcmul_(samples.down, slope_below.sub_(slope_above))
    slopes = torch.stack((slope_x, slope_y), dim=-1)
    by_location = slopes.mul_(samples.weights.unsqueeze(-1)).flatten(1).mul_(call.sizes)
    if call.logits:
        by_weight.mul_(samples.weights)
        total = by_weight.sum(-1, keepdim=True)
        by_weight.addcmul_(samples.weights, total, value=-1)
    return by_location, by_weight


def _scatter(parts: list[tuple[Tensor, ...]], grad: Tensor, grad_maps: Tensor) -> None:
    """Adds to the maps what the samples give.

    Sorted by their upper left pixels, the samples of a pixel are a bag; the three
    other corners have the same bags. No pixel is there twice, so that the order of
    sums is that of the samples.

    Args:
        parts: ``upper``, ``lower`` and the ``corners`` of :class:`Samples`, by tiles.
        grad: (n, D) of out, of all tiles.
    """
    upper, lower, *corners = (torch.cat(x) for x in zip(*parts, strict=True))
    bag_size = upper.shape[1]
    rows, order = upper.flatten().sort(stable=True)
    upper, counts = rows.unique_consecutive(return_counts=True)
    begins = counts.cumsum(0) - counts
    lower = lower.flatten()[order[begins]]
    bag = order.div(bag_size, rounding_mode='floor')
    pixels = (upper, upper + 1, lower, lower + 1)
    for index, weights in zip(pixels, corners, strict=True):
        sums = F.embedding_bag(
            bag, grad, begins, mode='sum', per_sample_weights=weights.flatten()[order]
        )
        grad_maps.index_add_(0, index, sums)
