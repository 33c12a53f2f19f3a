"""Sampled points of a key or value map, as vectors or through the whole map.

For the points ``map[p] = sum_c w[p, c] map[pixel[p, c]]`` of a chunk of n queries,
both classes give the same three things without autograd::

    product(x)      x (Hq, n, D)            -> (Hq, n, S)   x . map[p]
    combine(a)      a (Hq, n, S)            -> (Hq, n, D)   sum_p a[p] map[p]
    backward(a, x)  d/d map[p] = a[p] x     -> (G, n, S) twice, d/dy and d/dx in
                                               pixels; adds to the map's gradient

``GatheredSamples`` reads the vectors of the four pixels once for each kv head and
serves all of its query heads. ``DenseSamples`` uses that sampling is linear: the
products of x with all pixels are one matrix product and only scalars are
interpolated; the weights, scattered to pixels, are the factor of another one.

Here S = V * P, and a stack is a run of query heads that share kv head and offset
group: R = gcd(Hq / Hkv, Hq / G) heads.
"""

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass
class Taps:
    """The four pixels of each point; those outside the map have weight 0, index 0.

    Attributes:
        index: (G, n, S, 4) pixel in [0, V * Hk * Wk), int64.
        weight, slope_y, slope_x: (G, n, S, 4) bilinear weight and its derivatives by
            the position in pixels.
    """

    index: Tensor
    weight: Tensor
    slope_y: Tensor
    slope_x: Tensor

    @functools.cached_property
    def by_pixel(self) -> list['TapsOfGroup']:
        """Of each group; k and v share it."""
        pairs = zip(self.index, self.weight, strict=True)
        return [_sort_by_pixel(index.flatten(), w.flatten()) for index, w in pairs]


@dataclasses.dataclass
class TapsOfGroup:
    """The T = n * S * 4 taps of one group, sorted by pixel.

    Attributes:
        point: (T,) point in [0, n * S) of each.
        weight: (T,)
        pixel: Distinct pixels, ascending.
        first: Where the taps of each of these begin.
    """

    point: Tensor
    weight: Tensor
    pixel: Tensor
    first: Tensor


def _sort_by_pixel(index: Tensor, weight: Tensor) -> TapsOfGroup:
    index, order = index.sort()
    pixel, counts = index.unique_consecutive(return_counts=True)
    return TapsOfGroup(order // 4, weight[order], pixel, counts.cumsum(0) - counts)


def _axis_taps(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (...) in pixels -> index, weight and slope (..., 2) of two pixels."""
    first = at.floor()
    fraction = at - first
    pixel = torch.stack((first, first + 1), dim=-1)
    inside = (pixel >= 0) & (pixel < size)
    weight = torch.stack((1 - fraction, fraction), dim=-1)
    slope = torch.where(inside, at.new_tensor([-1.0, 1.0]), 0.0)
    # where, not a product: positions may be infinite or nan
    return (
        torch.where(inside, pixel, 0.0).long(),
        torch.where(inside, weight, 0.0),
        slope,
    )


def make_taps(coords: Tensor, grid_size: tuple[int, int]) -> Taps:
    """Taps of coords (G, n, V, P, 2) in (x, y), [0, 1], align_corners=True."""
    height, width = grid_size
    views = coords.shape[2]
    x, weight_x, slope_x = _axis_taps(coords[..., 0] * (width - 1), width)
    y, weight_y, slope_y = _axis_taps(coords[..., 1] * (height - 1), height)
    first = torch.arange(views, device=coords.device) * (height * width)
    y = y * width + first[:, None, None]

    def corners(by_y: Tensor, by_x: Tensor) -> Tensor:
        """Outer product (y, x) of the two pixels each, points of all views in a row."""
        return (by_y.unsqueeze(-1) * by_x.unsqueeze(-2)).flatten(-2).flatten(2, 3)

    return Taps(
        (y.unsqueeze(-1) + x.unsqueeze(-2)).flatten(-2).flatten(2, 3),
        corners(weight_y, weight_x),
        corners(slope_y, weight_x),
        corners(weight_y, slope_x),
    )


class GatheredSamples:
    """Samples as vectors: for large maps or few points."""

    def __init__(self, pixels: Tensor, grad: Tensor | None, heads: int, taps: Taps):
        """pixels and grad (Hkv, V * Hk * Wk, D)."""
        kv_heads, num_pixels, head_dim = pixels.shape
        groups = taps.index.shape[0]
        self.taps, self.grad = taps, grad
        self.shared = math.gcd(heads // kv_heads, heads // groups)  # R
        first_head = torch.arange(0, heads, self.shared, device=pixels.device)
        self.group = first_head // (heads // groups)
        self.kv_head = first_head // (heads // kv_heads)
        self.rows = pixels.reshape(-1, head_dim)
        # (U, n, S, 4)
        self.index = (
            taps.index[self.group] + (self.kv_head * num_pixels)[:, None, None, None]
        )
        self.values = self._sample(taps.weight)

    def _sample(self, weight: Tensor) -> Tensor:
        """(U * n, S, D) weighted sums of the four pixels."""
        sampled = F.embedding_bag(
            self.index.reshape(-1, 4),
            self.rows,
            mode='sum',
            per_sample_weights=weight[self.group].reshape(-1, 4),
        )
        return sampled.view(-1, self.index.shape[2], self.rows.shape[1])

    def _by_stack(self, x: Tensor) -> Tensor:
        """(Hq, n, C) -> (U * n, R, C)."""
        x = x.unflatten(0, (-1, self.shared)).transpose(1, 2)
        return x.reshape(-1, *x.shape[2:])

    def _by_head(self, x: Tensor) -> Tensor:
        """(U * n, R, C) -> (Hq, n, C)."""
        x = x.unflatten(0, (self.index.shape[0], -1))
        return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])

    def product(self, x: Tensor) -> Tensor:
        return self._by_head(torch.bmm(self._by_stack(x), self.values.transpose(1, 2)))

    def combine(self, a: Tensor) -> Tensor:
        return self._by_head(torch.bmm(self._by_stack(a), self.values))

    def backward(self, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        # (U * n, S, D)
        a, x = self._by_stack(a).transpose(1, 2), self._by_stack(x)
        grad = a * x if self.shared == 1 else torch.bmm(a, x)  # bmm is slow at rank 1
        self._scatter(grad)
        return self._slope(grad, self.taps.slope_y), self._slope(
            grad, self.taps.slope_x
        )

    def _scatter(self, grad: Tensor) -> None:
        """Adds (U * n, S, D), times the weights, to the pixels.

        The sum over the taps of a pixel is a gather again, in the order of pixels,
        which all stacks of a group share.
        """
        groups, num_pixels = self.taps.index.shape[0], self.grad.shape[1]
        # (G, U / G, n * S, D)
        grad = grad.view(groups, len(self.group) // groups, -1, grad.shape[-1])
        first_row = (self.kv_head * num_pixels).view(groups, -1, 1)
        rows = self.grad.view(-1, grad.shape[-1])
        stack = torch.arange(grad.shape[1], device=grad.device).unsqueeze(1)
        for taps, of_group, first in zip(
            self.taps.by_pixel, grad, first_row, strict=True
        ):
            sums = F.embedding_bag(
                (taps.point + stack * of_group.shape[1]).flatten(),
                of_group.flatten(0, 1),
                (taps.first + stack * len(taps.point)).flatten(),
                mode='sum',
                per_sample_weights=taps.weight.repeat(len(stack)),
            )
            rows.index_add_(0, (taps.pixel + first).flatten(), sums)

    def _slope(self, grad: Tensor, slope: Tensor) -> Tensor:
        by_stack = self._sample(slope).mul_(grad).sum(-1)
        by_stack = by_stack.view(slope.shape[0], -1, *slope.shape[1:3])
        return by_stack.sum(1)


class DenseSamples:
    """Samples through products with the whole map: for small maps."""

    def __init__(self, pixels: Tensor, grad: Tensor | None, heads: int, taps: Taps):
        """pixels and grad (Hkv, V * Hk * Wk, D)."""
        self.pixels, self.grad, self.heads, self.taps = pixels, grad, heads, taps
        groups, num_queries = taps.index.shape[:2]
        self.index = (
            taps.index.reshape(groups, 1, num_queries, -1)
            .expand(-1, heads // groups, -1, -1)
            .reshape(heads, num_queries, -1)
        )

    def _by_kv_head(self, x: Tensor) -> Tensor:
        """(Hq, n, C) -> (Hkv, Hq / Hkv * n, C)."""
        return x.reshape(self.pixels.shape[0], -1, x.shape[-1])

    def _by_group(self, x: Tensor) -> Tensor:
        """(Hq, n, ...) -> (G, Hq / G, n, ...)."""
        return x.unflatten(0, (self.taps.index.shape[0], -1))

    def product(self, x: Tensor) -> Tensor:
        everywhere = torch.bmm(self._by_kv_head(x), self.pixels.transpose(1, 2))
        everywhere = everywhere.view(self.heads, x.shape[1], -1)
        # (G, Hq / G, n, S, 4); backward needs it again
        self.at_taps = self._by_group(
            everywhere.gather(-1, self.index).unflatten(-1, (-1, 4))
        )
        return (self.at_taps * self.taps.weight.unsqueeze(1)).sum(-1).flatten(0, 1)

    def _scatter(self, a: Tensor) -> Tensor:
        """(Hq, n, S) -> (Hkv, Hq / Hkv * n, V * Hk * Wk): weights of the pixels."""
        at_taps = self._by_group(a).unsqueeze(-1) * self.taps.weight.unsqueeze(1)
        everywhere = a.new_zeros(*a.shape[:2], self.pixels.shape[1])
        everywhere.scatter_add_(-1, self.index, at_taps.reshape(self.index.shape))
        return self._by_kv_head(everywhere)

    def combine(self, a: Tensor) -> Tensor:
        return torch.bmm(self._scatter(a), self.pixels).view(*a.shape[:2], -1)

    def backward(self, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last :meth:`product` must have been that of the same ``x``."""
        self.grad.baddbmm_(self._scatter(a).transpose(1, 2), self._by_kv_head(x))
        # (G, n, S, 4)
        grad = (self.at_taps * self._by_group(a).unsqueeze(-1)).sum(1)
        return (grad * self.taps.slope_y).sum(-1), (grad * self.taps.slope_x).sum(-1)
