"""deform_attn in tiles of queries: definition in ``naive.py``."""

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.heads import repeat_kv
from ..common.layout import empty_tokens_like
from ..common.tile_attention import (
    attend_tile,
    attend_tile_backward,
    dropout_scale,
    with_lse,
    with_ones,
    with_row_sums,
)
from .tiled_bias import (
    AxisTaps,
    BandBias,
    BandRows,
    TileBias,
    axis_taps,
    pad_table,
    table_step,
    window_size,
)

# Queries of a tile, and how many (query, key) weights exist at a time. Both were chosen
# by measuring: weights should stay in the cache of a core.
TILE_ROWS, TILE_COLS = 20, 24
MAX_WEIGHTS = 2**19
# A tile has fewer columns where queries are far apart in the table, as the work of the
# bias grows with the cells that the tile spans.
TILE_CELLS, MIN_TILE_COLS = 12, 16
# Tap weights of the query rows in a band, which are kept for all columns of tiles, and
# numbers of its bias along x. A narrow map has few columns: the taps of all its rows
# would be more than its weights.
MAX_TAPS = 2**21


def _spans(size: int, most: int) -> list[slice]:
    """Cuts an axis into parts of nearly equal length, at most ``most`` each."""
    parts = -(-size // most)
    ends = [size * i // parts for i in range(parts + 1)]
    return [slice(*span) for span in itertools.pairwise(ends)]


def _batched(spans: list[slice], most: int) -> Iterator[list[slice]]:
    for start in range(0, len(spans), most):
        yield spans[start : start + most]


@dataclasses.dataclass
class _Tile:
    """Some (batch, head) pairs and a rectangle of queries.

    The pairs are all heads of some samples, or some heads of one: neighbours if counted
    head by head.
    """

    number: int
    samples: slice
    heads: slice
    pairs: slice
    rows: slice
    cols: slice
    bias: TileBias | None


class _Problem:
    """The call as B * Hq attentions of one head, cut into tiles.

    X = B * Hq pairs of batch and head lead the tensors of keys; those of queries are
    used as they lie in memory.
    """

    def __init__(self, q, k, v, pos, rpb_table, grid_size):
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.batch, self.num_heads = q.shape[:2]
        self.grid_size = grid_size
        self.k, self.v = (
            repeat_kv(t, self.num_heads).flatten(0, 1).to(self.dtype) for t in (k, v)
        )
        self.has_bias = rpb_table is not None
        self.table_size = (1, 1)
        if self.has_bias:
            self.pos = repeat_kv(pos, self.num_heads).flatten(0, 1)
            self.table = pad_table(rpb_table, self.dtype)
            self.table_size = rpb_table.shape[1:]

    def as_map(self, x: Tensor) -> Tensor:
        """(B, Hq, N, ...) -> (B, Hq, H, W, ...), a view."""
        return x.unflatten(2, self.grid_size)

    def _spans_of_pairs(self, most: int) -> Iterator[tuple[slice, slice, slice]]:
        """(samples, heads, pairs) of tiles that have at most ``most`` pairs."""
        samples = _spans(self.batch, max(1, most // self.num_heads))
        for sample, head in itertools.product(samples, _spans(self.num_heads, most)):
            first = sample.start * self.num_heads + head.start
            last = (sample.stop - 1) * self.num_heads + head.stop
            yield sample, head, slice(first, last)

    def _tile_shape(self) -> tuple[int, int, int]:
        """(pairs, rows, columns) of a tile; few where there are many keys."""
        num_keys = self.k.shape[1]
        most = max(1, MAX_WEIGHTS // num_keys)
        step = table_step(self.grid_size[1], self.table_size[1])
        wanted = int(TILE_CELLS / step) if step else TILE_COLS
        cols = min(max(wanted, MIN_TILE_COLS), TILE_COLS, most, self.grid_size[1])
        rows = max(1, min(TILE_ROWS, most // cols, self.grid_size[0]))
        # Few queries far apart in a fine table span many more cells than they have
        # weights.
        while self._numbers(rows, cols) > 4 * most and (rows, cols) != (1, 1):
            rows, cols = (-(-rows // 2), cols) if rows > 1 else (rows, -(-cols // 2))
        return max(1, most // self._numbers(rows, cols)), rows, cols

    def _window(self, axis: int, num_queries: int) -> int:
        return window_size(num_queries, self.grid_size[axis], self.table_size[axis])

    def _numbers(self, rows: int, cols: int) -> int:
        """Numbers for each key in the largest tensor of a tile and its bias."""
        return max(rows, self._window(0, rows)) * max(cols, self._window(1, cols))

    def tiles(self, with_slopes: bool) -> Iterator[_Tile]:
        """All tiles."""
        num_pairs, num_rows, num_cols = self._tile_shape()
        row_spans = _spans(self.grid_size[0], num_rows)
        col_spans = _spans(self.grid_size[1], num_cols)
        number = itertools.count()
        for samples, heads, pairs in self._spans_of_pairs(num_pairs):
            if self.has_bias:
                parts = self._biased_parts(pairs, row_spans, col_spans, with_slopes)
            else:
                parts = itertools.product(row_spans, col_spans, [None])
            for part in parts:
                yield _Tile(next(number), samples, heads, pairs, *part)

    def _biased_parts(
        self,
        pairs: slice,
        row_spans: list[slice],
        col_spans: list[slice],
        with_slopes: bool,
    ) -> Iterator[tuple[slice, slice, TileBias]]:
        """(rows, columns, bias) of the tiles of some pairs, band by band of rows."""
        for band in _batched(
            row_spans, self._rows_of_band(pairs, row_spans, col_spans)
        ):
            yield from self._biased_band(pairs, band, col_spans, with_slopes)

    def _rows_of_band(
        self, pairs: slice, row_spans: list[slice], col_spans: list[slice]
    ) -> int:
        """Spans of rows in a band: as many as memory allows, one at least."""
        num_keys = (pairs.stop - pairs.start) * self.k.shape[1]
        num_rows, num_cols = (
            max(span.stop - span.start for span in spans)
            for spans in (row_spans, col_spans)
        )
        width = max(num_cols, self._window(1, num_cols))
        taps = num_keys * num_rows * self._window(0, num_rows)
        count = max(1, min(len(row_spans), MAX_TAPS // taps))
        while count > 1 and (
            num_keys * self._window(0, count * num_rows) * width > MAX_TAPS
        ):
            count -= 1
        return count

    def _biased_band(
        self,
        pairs: slice,
        row_spans: list[slice],
        col_spans: list[slice],
        with_slopes: bool,
    ) -> Iterator[tuple[slice, slice, TileBias]]:
        """As above; tiles of the same rows or columns share the taps."""
        pair = torch.arange(pairs.start, pairs.stop, device=self.pos.device)
        head = pair % self.num_heads
        row_taps = [self._taps(0, pairs, rows, with_slopes) for rows in row_spans]
        # Two rows more than the queries reach, as windows are rounded one by one.
        window = self._window(0, row_spans[-1].stop - row_spans[0].start)
        size = min(window + 2, self.table.shape[1])
        start = torch.stack([taps.start for taps in row_taps]).amin(0)
        start.clamp_(max=self.table.shape[1] - size)
        band_rows = [BandRows.of(taps, start, size) for taps in row_taps]
        for cols in col_spans:
            col_taps = self._taps(1, pairs, cols, with_slopes)
            band = BandBias(self.table, head, start, size, col_taps)
            for rows, of_band in zip(row_spans, band_rows, strict=True):
                yield rows, cols, TileBias(band, of_band)

    def bias(self, tile: _Tile) -> Tensor:
        """(X, S, r * c) in units of ln 2, a new tensor."""
        if tile.bias is not None:
            return tile.bias.value()
        rows, cols = (part.stop - part.start for part in (tile.rows, tile.cols))
        num_pairs = tile.pairs.stop - tile.pairs.start
        return self.k.new_zeros(num_pairs, self.k.shape[1], rows * cols)

    def _taps(
        self, axis: int, pairs: slice, span: slice, with_slopes: bool
    ) -> AxisTaps:
        return axis_taps(
            self.pos[pairs, :, axis],
            span,
            self.grid_size[axis],
            self.table_size[axis],
            with_slopes,
        )

    def cut(self, x: Tensor, tile: _Tile) -> Tensor:
        """The tile of a map (B, Hq, H, W, ...) -> (x, r * c, ...)."""
        x = x[tile.samples, tile.heads, tile.rows, tile.cols].to(self.dtype)
        return x.flatten(2, 3).flatten(0, 1)


def _paste(x: Tensor, tile: _Tile, part: Tensor) -> None:
    """Inverse of :meth:`_Problem.cut`."""
    target = x[tile.samples, tile.heads, tile.rows, tile.cols]
    target.copy_(part.reshape(target.shape))


def deform_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    rpb_table: Tensor | None,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
    pos_in_range: bool,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Hq, N, D), dtype of q, and lse (B, Hq, N), float32 or float64."""
    out = empty_tokens_like(q)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    if q.numel() == 0:
        return out, lse
    problem = _Problem(q, k, v, pos, rpb_table, grid_size)
    q_map, out_map, lse_map = (problem.as_map(t) for t in (q, out, lse))
    for tile in problem.tiles(with_slopes=False):
        bias = problem.bias(tile)
        drop = dropout_scale(bias.shape, dropout_p, seed + tile.number, bias)
        tile_out, tile_lse = attend_tile(
            problem.cut(q_map, tile),
            problem.k[tile.pairs],
            problem.v[tile.pairs],
            bias,
            scale,
            drop,
        )
        _paste(out_map, tile, tile_out)
        _paste(lse_map, tile, tile_lse)
    return out, lse


def deform_attn_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    rpb_table: Tensor | None,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
    pos_in_range: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, pos and rpb_table, in their shapes and dtypes.

    Those of pos and rpb_table are empty where there is no table.
    """
    grad_q = empty_tokens_like(q)
    if q.numel() == 0:
        return grad_q, *(_zeros_like(t, q) for t in (k, v, pos, rpb_table))
    problem = _Problem(q, k, v, pos, rpb_table, grid_size)
    dtype = problem.dtype
    q_map = problem.as_map(with_lse(q.to(dtype), lse, scale))
    grad_out_map = problem.as_map(with_row_sums(grad_out.to(dtype), out.to(dtype)))
    grad_q_map = problem.as_map(grad_q)
    k_ones, v_ones = with_ones(problem.k), with_ones(problem.v)
    grad_k, grad_v = torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    grad_bias = _BiasGradient(problem) if problem.has_bias else None
    for tile in problem.tiles(with_slopes=True):
        bias = problem.bias(tile)
        drop = dropout_scale(bias.shape, dropout_p, seed + tile.number, bias)
        tile_grad_q, tile_grad_k, tile_grad_v, tile_grad_bias = attend_tile_backward(
            problem.cut(q_map, tile),
            problem.cut(grad_out_map, tile),
            k_ones[tile.pairs],
            v_ones[tile.pairs],
            bias,
            scale,
            drop,
        )
        _paste(grad_q_map, tile, tile_grad_q)
        grad_k[tile.pairs] += tile_grad_k
        grad_v[tile.pairs] += tile_grad_v
        if grad_bias is not None:
            grad_bias.add(tile, tile_grad_bias)
    grads = grad_q, _sum_heads(grad_k, k), _sum_heads(grad_v, v)
    if grad_bias is None:
        return *grads, q.new_empty(0), q.new_empty(0)
    return (
        *grads,
        _sum_heads(grad_bias.pos, pos),
        grad_bias.table[:, 1:-1, 1:-1].to(rpb_table.dtype).contiguous(),
    )


class _BiasGradient:
    """Sums over the tiles: gradients of pos (X, S, 2) and of the padded table."""

    def __init__(self, problem: _Problem):
        self.pos = torch.zeros_like(problem.pos)
        self.table = torch.zeros_like(problem.table)

    def add(self, tile: _Tile, grad: Tensor) -> None:
        grad_y, grad_x = tile.bias.backward(grad, self.table.view(-1))
        self.pos[tile.pairs, :, 0] += grad_y
        self.pos[tile.pairs, :, 1] += grad_x


def _zeros_like(x: Tensor | None, q: Tensor) -> Tensor:
    """Gradient where there are no queries; empty for an absent input."""
    return q.new_empty(0) if x is None else torch.zeros_like(x)


def _sum_heads(grad: Tensor, like: Tensor) -> Tensor:
    """(B * Hq, S, ...) -> the shape of ``like``: sums the query heads that share it."""
    grad = grad.view(*like.shape[:2], -1, *like.shape[2:])
    return grad.sum(2).to(like.dtype)
