"""ms_deform_attn on tiles of queries: definition in ``naive.py``.

A pixel of a value head is a row of D numbers. The output of a query's head is a
weighted sum of L * P * 4 rows, an embedding bag. Backward needs the products of these
rows with the head's gradient, one for each pixel; from them follow the gradients of
weights and locations. The gradient of the rows is an embedding bag as well, once the
samples are sorted by pixel: the same sum in the same order each time.

A sample at t, in pixels along an axis, takes two neighbours that are both on the map:
``near = clamp(floor(t), 0, side - 2)`` and ``far = near + 1``. Their weights are tents,
``max(0, 1 - |t - near|)``: where t is off the map, they are those of pixels that are
there, and 0 for those that are not. So nothing is masked, and the maps are read as they
are given. Sides below 2 are filled up with zeros.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .levels import check_levels

# Of a tile: fewer stay in cache; more share the sums over the maps, and the calls of
# torch, each of which waits for all threads.
SAMPLES = 2**18
LEAST_SIDE = 2


class Level(NamedTuple):
    """One map: its size, its first pixel, and that after all maps were filled up."""

    height: int
    width: int
    start: int
    first: int

    @property
    def filled_height(self) -> int:
        return max(self.height, LEAST_SIDE)

    @property
    def filled_width(self) -> int:
        return max(self.width, LEAST_SIDE)

    @property
    def keys(self) -> slice:
        return slice(self.start, self.start + self.height * self.width)

    @property
    def rows(self) -> slice:
        """All of the filled map."""
        return slice(self.first, self.first + self.filled_height * self.filled_width)

    def inside(self, pixels: Tensor) -> Tensor:
        """(S', Mv, D) -> the view (H, W, Mv, D) of this map without what fills it."""
        maps = pixels[self.rows].unflatten(0, (self.filled_height, self.filled_width))
        return maps[: self.height, : self.width]


def _make_levels(shapes: Tensor, starts: Tensor, num_keys: int) -> list[Level]:
    levels, first = [], 0
    for size in check_levels(shapes.tolist(), starts.tolist(), num_keys):
        levels.append(Level(*size, first))
        first = levels[-1].rows.stop
    return levels


class Axis(NamedTuple):
    """Samples along one axis, each (q, M * E), for q queries and E = L * P of a head.

    Attributes:
        pixel: The near one, an integer as a float.
        offset: From it to the sample; in [0, 1) inside of the map.
        near, far: Weights of the two pixels.
    """

    pixel: Tensor
    offset: Tensor
    near: Tensor
    far: Tensor

    @classmethod
    def at(cls, coordinates: Tensor, sides: Tensor, last: Tensor) -> 'Axis':
        """From locations in [0, 1], sides of the maps, and the last near pixels."""
        at = (coordinates * sides).sub_(0.5)
        at.nan_to_num_(nan=-9.0)  # what is no number is outside
        pixel = torch.minimum(at.clamp(min=0.0), last).floor_()
        offset = at.sub_(pixel)
        return cls(pixel, offset, _tent(offset.abs()), _tent((offset - 1).abs_()))

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Derivatives of ``near`` and ``far``."""
        cell = self.offset.floor()
        inside = (cell == 0).to(cell.dtype)
        return (cell == -1).to(cell.dtype) - inside, inside - (cell == 1).to(cell.dtype)


def _tent(distance: Tensor) -> Tensor:
    return distance.neg_().add_(1).clamp_(min=0)


class Samples(NamedTuple):
    """The samples of a tile.

    Attributes:
        x, y: Where they lie.
        upper, lower: (q, M * E) rows of the left pixels; the right ones are Mv rows
            further. int32.
        weights: (q, M * E) normalised.
        corners: Four of (q, M * E), weights times the bilinear ones: upper left, upper
            right, lower left, lower right.
    """

    x: Axis
    y: Axis
    upper: Tensor
    lower: Tensor
    weights: Tensor
    corners: tuple[Tensor, Tensor, Tensor, Tensor]


class _Call:
    """The tensors of a call and the geometry of its maps."""

    def __init__(self, value, shapes, starts, locations, weights, logits):
        self.value, self.locations, self.weights = value, locations, weights
        self.logits, self.dtype = logits, locations.dtype
        self.batch, num_keys, self.value_heads, self.dim = value.shape
        self.num_queries, self.heads, _, points = locations.shape[1:5]
        self.bag_size = len(shapes) * points
        self.levels = _make_levels(shapes, starts, num_keys)
        self.is_filled = self.levels[-1].rows.stop != num_keys
        # One number for each sample of a query: sums and products with rows of M * E
        # numbers are fast where those with one number for a level are not.
        numbers = [
            (
                level.width,
                level.height,
                level.filled_width - LEAST_SIDE,
                level.filled_height - LEAST_SIDE,
            )
            for level in self.levels
            for _ in range(points)
        ]
        rows = zip(*numbers * self.heads, strict=True)
        self.width, self.height, self.last_x, self.last_y = (
            self._constant(row, self.dtype) for row in rows
        )
        group = self.heads // self.value_heads
        rows = zip(
            *(
                (
                    level.filled_width * self.value_heads,
                    level.first * self.value_heads + head // group,
                )
                for head in range(self.heads)
                for level in self.levels
                for _ in range(points)
            ),
            strict=True,
        )
        self.strides, self.origins = (self._constant(row, torch.int32) for row in rows)

    def _constant(self, row: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Copied to the device of value without waiting for it."""
        return torch.tensor(row, dtype=dtype).to(self.value.device, non_blocking=True)

    @property
    def is_empty(self) -> bool:
        return 0 in self.value.shape[:2] or self.num_queries == 0

    def rows(self, image: int) -> Tensor:
        """(S' * Mv, D): the values of an image, pixel by pixel."""
        pixels = self.value[image].to(self.dtype)
        if self.is_filled:
            pixels, given = self.new_pixels(), pixels
            for level in self.levels:
                inside = level.inside(pixels)
                inside.copy_(given[level.keys].view(inside.shape))
        return pixels.reshape(-1, self.dim)

    def new_pixels(self) -> Tensor:
        """(S', Mv, D) zeros, for the values of an image."""
        size = (self.levels[-1].rows.stop, self.value_heads, self.dim)
        return self.value.new_zeros(size, dtype=self.dtype)

    def tiles(self) -> Iterator[slice]:
        """Slices of the queries with about ``SAMPLES`` samples each."""
        size = max(1, SAMPLES // (self.heads * self.bag_size))
        for first in range(0, self.num_queries, size):
            yield slice(first, min(first + size, self.num_queries))

    def bags(self, x: Tensor) -> Tensor:
        """(q, M * E) -> (q * M, E), one for each query and head."""
        return x.view(-1, self.bag_size)

    def corner_rows(
        self, samples: Samples, rows: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each corner the index (q * M, E), and the rows that it belongs to."""
        for index in (samples.upper, samples.lower):
            yield self.bags(index), rows
            yield self.bags(index), rows[self.value_heads :]

    def sample(self, image: int, queries: slice) -> Samples:
        at = self.locations[image, queries].flatten(1, 3).contiguous()
        x = Axis.at(at[..., 0], self.width, self.last_x)
        y = Axis.at(at[..., 1], self.height, self.last_y)
        upper = x.pixel.to(torch.int32).mul_(self.value_heads).add_(self.origins)
        upper.addcmul_(y.pixel.to(torch.int32), self.strides)
        weights = self.weights[image, queries].flatten(2).to(self.dtype).contiguous()
        if self.logits:
            weights = weights.softmax(-1)
        weights = weights.flatten(1)
        above, below = weights * y.near, weights * y.far
        corners = above * x.near, above.mul_(x.far), below * x.near, below.mul_(x.far)
        return Samples(x, y, upper, upper + self.strides, weights, corners)


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
    out = value.new_empty(call.batch, call.num_queries, call.heads * call.dim)
    if call.is_empty:
        return out.zero_()
    for image in range(call.batch):
        rows = call.rows(image)
        for queries in call.tiles():
            samples = call.sample(image, queries)
            sums = (
                F.embedding_bag(
                    index, pixels, mode='sum', per_sample_weights=call.bags(weights)
                )
                for (index, pixels), weights in zip(
                    call.corner_rows(samples, rows), samples.corners, strict=True
                )
            )
            part = functools.reduce(Tensor.add_, sums)
            out[image, queries] = part.view(-1, call.heads * call.dim)
    return out


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
    grad_value = torch.zeros_like(value, memory_format=torch.contiguous_format)
    grad_locations, grad_weights = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (locations, weights)
    )
    if call.is_empty:
        return grad_value, grad_locations.zero_(), grad_weights.zero_()
    is_direct = value.dtype == call.dtype and not call.is_filled
    for image in range(call.batch):
        rows = call.rows(image)
        grad_pixels = grad_value[image] if is_direct else call.new_pixels()
        for queries in call.tiles():
            samples = call.sample(image, queries)
            # (q * M, D)
            grad = grad_out[image, queries].to(call.dtype).reshape(-1, call.dim)
            by_location, by_weight = _gradients(call, samples, rows, grad)
            part = grad_locations[image, queries]
            part.copy_(by_location.view(part.shape))
            part = grad_weights[image, queries]
            part.copy_(by_weight.view(part.shape))
            _scatter(call, samples, grad, grad_pixels.flatten(0, 1))
        if not is_direct:
            for level in call.levels:
                inside = level.inside(grad_pixels)
                part = grad_value[image, level.keys]
                part.copy_(inside.reshape(part.shape))
    return grad_value, grad_locations, grad_weights


def row_products(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """rows (.., D) at index (n, E), times x (n, D) -> (n, E)."""
    # torch gives a sparse matrix no more elements than a dense one has.
    is_sparse = rows.device.type == 'cpu' and index.shape[1] <= rows.shape[0]
    return (sparse_products if is_sparse else gathered_products)(rows, index, x)


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
    call: _Call, samples: Samples, rows: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of locations and of weights (q, M * E), from that of out (q * M, D)."""
    upper_left, upper_right, lower_left, lower_right = (
        row_products(pixels, index, grad).view_as(samples.weights)
        for index, pixels in call.corner_rows(samples, rows)
    )
    x, y, weights = samples.x, samples.y, samples.weights
    (near_x, far_x), (near_y, far_y) = x.slopes(), y.slopes()
    above = (upper_left * x.near).addcmul_(upper_right, x.far)
    below = (lower_left * x.near).addcmul_(lower_right, x.far)
    by_y = near_y.mul_(above).addcmul_(far_y, below)
    slope_above = upper_left.mul_(near_x).addcmul_(upper_right, far_x)
    slope_below = lower_left.mul_(near_x).addcmul_(lower_right, far_x)
    by_x = slope_above.mul_(y.near).addcmul_(slope_below, y.far)
    by_weight = above.mul_(y.near).addcmul_(below, y.far)
    by_location = torch.stack(
        (
            by_x.mul_(weights).mul_(call.width),
            by_y.mul_(weights).mul_(call.height),
        ),
        dim=-1,
    )
    if call.logits:
        by_weight.mul_(weights)
        total = call.bags(by_weight).sum(-1, keepdim=True)
        call.bags(by_weight).addcmul_(call.bags(weights), total, value=-1)
    return by_location, by_weight


def _scatter(call: _Call, samples: Samples, grad: Tensor, grad_rows: Tensor) -> None:
    """Adds to the rows what the samples give.

    Sorted by their upper left pixels, the samples of a pixel are a bag; the three
    other corners have the same bags. No pixel is there twice, so that the order of
    sums is that of the samples.

    Args:
        call: The maps.
        samples: Of the tile.
        grad: (q * M, D) of out.
        grad_rows: (S' * Mv, D).
    """
    upper, order = samples.upper.flatten().sort(stable=True)
    upper, counts = upper.unique_consecutive(return_counts=True)
    begins = counts.cumsum(0) - counts
    upper = upper.long()
    lower = samples.lower.flatten()[order[begins]].long()
    bag = order.div(call.bag_size, rounding_mode='floor')
    right = call.value_heads
    pixels = (upper, upper + right, lower, lower + right)
    for index, weights in zip(pixels, samples.corners, strict=True):
        weights = weights.flatten().index_select(0, order)
        sums = F.embedding_bag(
            bag, grad, begins, mode='sum', per_sample_weights=weights
        )
        grad_rows.index_add_(0, index, sums)
