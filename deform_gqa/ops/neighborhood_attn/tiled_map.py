"""A map of queries and one of keys, cut into tiles, and the way between the two.

Tiles have one batch dimension X = samples * Hkv * tiles, and the query heads of a kv
head stand beside the queries, so that grouped heads share their keys in one product.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .tiled_halos import (
    TILE_HEIGHT,
    TILE_WIDTH,
    TiledAxis,
    add_halos,
    bias_table,
    crop,
    cut_axis,
    gather_halos,
    reduce_bias_table,
    write_inside,
)

# Weights of the tiles worked on at once: about what a core's cache holds.
CHUNK_ELEMENTS = 2**19


class Chunk(NamedTuple):
    """Tiles worked on at once: some samples, rows of tiles and columns of tiles."""

    batch: slice
    rows: range
    cols: range
    seed: int

    @property
    def num_tiles(self) -> int:
        return len(self.rows) * len(self.cols)


class TiledMap:
    """One undilated map: its cut, its bias and the way between maps and tiles."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        rpb: Tensor | None,
        kernel_size: int,
    ) -> None:
        """q (B, Hq, H, W, D) and k (B, Hkv, H, W, D), any strides."""
        self.batch, heads, height, width, _ = q.shape
        self.kv_heads = k.shape[1]
        self.kernel_size = kernel_size
        self.groups = heads // self.kv_heads
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.axis_y = cut_axis(height, kernel_size, TILE_HEIGHT)
        self.axis_x = cut_axis(width, kernel_size, TILE_WIDTH)
        like = q.new_empty(0, dtype=self.dtype)
        self.bias = bias_table(rpb, self.groups, self.axis_y, self.axis_x, like)
        rows = self.axis_y.pattern_ids.to(q.device)
        cols = self.axis_x.pattern_ids.to(q.device)
        self.pattern_ids = rows[:, None] * len(self.axis_x.patterns) + cols

    def chunks(self, seed: int) -> Iterator[Chunk]:
        """All tiles, in chunks of about ``CHUNK_ELEMENTS`` weights."""
        weights = self.kv_heads * self.bias.shape[2] * self.bias.shape[3]
        num_tiles = max(1, CHUNK_ELEMENTS // weights)
        step_x = min(num_tiles, self.axis_x.num_tiles)
        step_y = min(num_tiles // step_x, self.axis_y.num_tiles)
        step_b = num_tiles // (step_x * step_y)
        for first in range(0, self.batch, step_b):
            batch = slice(first, min(first + step_b, self.batch))
            for rows in _split(self.axis_y, step_y):
                for cols in _split(self.axis_x, step_x):
                    yield Chunk(batch, rows, cols, seed)
                    seed += 1

    def query_tiles(self, x: Tensor, chunk: Chunk, fill: float = 0.0) -> Tensor:
        """Map (B, Hq, H, W, D) -> (X, groups * queries, D), X = b * Hkv * tiles."""
        axis_y, axis_x = self.axis_y, self.axis_x
        tiles = crop(
            x[chunk.batch],
            axis_y.query_range(chunk.rows),
            axis_x.query_range(chunk.cols),
            fill,
        ).to(self.dtype)
        tiles = tiles.unflatten(3, (-1, axis_x.tile)).unflatten(2, (-1, axis_y.tile))
        tiles = tiles.unflatten(1, (self.kv_heads, self.groups))
        tiles = tiles.permute(0, 1, 3, 5, 2, 4, 6, 7)
        return tiles.reshape(-1, self.groups * axis_y.tile * axis_x.tile, x.shape[-1])

    def write_queries(self, target: Tensor, tiles: Tensor, chunk: Chunk) -> None:
        """Inverse of :meth:`query_tiles`: tiles into the map ``target``."""
        axis_y, axis_x = self.axis_y, self.axis_x
        grid = (len(chunk.rows), len(chunk.cols), self.groups, axis_y.tile, axis_x.tile)
        tiles = tiles.view(-1, self.kv_heads, *grid, target.shape[-1])
        tiles = tiles.permute(0, 1, 4, 2, 5, 3, 6, 7)
        tiles = tiles.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        write_inside(
            target[chunk.batch],
            tiles,
            axis_y.query_range(chunk.rows),
            axis_x.query_range(chunk.cols),
        )

    def key_tiles(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map (B, Hkv, H, W, D) -> (X, keys, D)."""
        keys = crop(
            x[chunk.batch],
            self.axis_y.key_range(chunk.rows),
            self.axis_x.key_range(chunk.cols),
        ).to(self.dtype)
        return gather_halos(keys, self.axis_y, self.axis_x)

    def bias_tiles(self, chunk: Chunk) -> Tensor:
        """A new tensor (X, keys, groups * queries)."""
        bias = self.bias.index_select(1, self._pattern_ids(chunk))
        batch = chunk.batch.stop - chunk.batch.start
        bias = bias.expand(batch, self.kv_heads, *bias.shape[1:])
        # reshape alone may return a view of stride 0, which cannot be written to
        return bias.reshape(-1, *bias.shape[3:]).contiguous()

    def add_bias_gradient(self, target: Tensor, grad: Tensor, chunk: Chunk) -> None:
        """Sum grad (X, keys, groups * queries) over equal tiles into ``target``."""
        ids = self._pattern_ids(chunk)
        patterns = torch.arange(target.shape[1], device=ids.device)
        one_hot = (patterns[:, None] == ids).to(grad.dtype)
        grad = grad.view(-1, self.kv_heads, chunk.num_tiles, target.shape[2])
        grad = grad[0] if len(grad) == 1 else grad.sum(0)
        target.baddbmm_(one_hot.expand(self.kv_heads, -1, -1), grad)

    def new_padded_keys(self, channels: int) -> Tensor:
        """Zeros (B, Hkv, padded height, padded width, D) for :meth:`add_keys`."""
        return self.bias.new_zeros(
            self.batch,
            self.kv_heads,
            self.axis_y.padded_keys,
            self.axis_x.padded_keys,
            channels,
        )

    def add_keys(self, padded: Tensor, tiles: Tensor, chunk: Chunk) -> None:
        """Transpose of :meth:`key_tiles`: add tiles (X, keys, D) to a padded map."""
        target = padded[chunk.batch]
        add_halos(target, tiles, chunk.rows, chunk.cols, self.axis_y, self.axis_x)

    def write_keys(self, target: Tensor, padded: Tensor) -> None:
        """The inside of a padded map into the map ``target`` (B, Hkv, H, W, D)."""
        rows = self.axis_y.key_range(range(self.axis_y.num_tiles))
        cols = self.axis_x.key_range(range(self.axis_x.num_tiles))
        write_inside(target, padded, rows, cols)

    def reduce_bias(self, grad: Tensor) -> Tensor:
        """Gradient of rpb (Hq, 2K-1, 2K-1) from that of all patterns."""
        return reduce_bias_table(
            grad, self.groups, self.kernel_size, self.axis_y, self.axis_x
        )

    def _pattern_ids(self, chunk: Chunk) -> Tensor:
        rows = slice(chunk.rows.start, chunk.rows.stop)
        cols = slice(chunk.cols.start, chunk.cols.stop)
        return self.pattern_ids[rows, cols].flatten()


def _split(axis: TiledAxis, step: int) -> Iterator[range]:
    for start in range(0, axis.num_tiles, step):
        yield range(start, min(start + step, axis.num_tiles))
