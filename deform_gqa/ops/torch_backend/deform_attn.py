"""deform_attn in tiles of queries: definition in ``ops/functional.py``."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..naive import repeat_kv
from .bias import TileBias, axis_taps, pad_table
from .tile_attention import attend_tile, attend_tile_backward, dropout_scale

# Queries of a tile, and how many (query, key, head) weights exist at a time. Both
# were chosen by measuring: weights should stay in the cache of a core.
TILE_ROWS, TILE_COLS = 16, 64
MAX_WEIGHTS = 2**21


def _tile_shape(grid_size: tuple[int, int], weights_per_query: int) -> tuple[int, int]:
    """(rows, columns) of a tile; fewer rows, then columns, where keys are many."""
    rows, cols = min(TILE_ROWS, grid_size[0]), min(TILE_COLS, grid_size[1])
    most = max(1, MAX_WEIGHTS // weights_per_query)
    cols = min(cols, most)
    return max(1, min(rows, most // cols)), cols


class _Problem:
    """The call with heads sorted by (batch, offset group), cut into tiles.

    X pairs of batch and offset group lead every tensor, h = Hq / G heads follow.
    """

    def __init__(self, q, k, v, pos, rpb_table, grid_size):
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        batch, self.num_heads = q.shape[:2]
        self.groups = pos.shape[1]
        self.grid_size = grid_size
        self.heads = self.num_heads // self.groups
        self.pairs = batch * self.groups
        self.q = self.by_pair(q)
        self.k = self.by_pair(repeat_kv(k, self.num_heads)).to(self.dtype)
        self.v = self.by_pair(repeat_kv(v, self.num_heads)).to(self.dtype)
        self.pos = pos.reshape(self.pairs, -1, 2)
        self.table = pad_table(rpb_table, self.dtype)
        self.table_size = rpb_table.shape[1:]

    def by_pair(self, x: Tensor) -> Tensor:
        """(B, Hq, ...) -> (B * G, h, ...)."""
        return x.reshape(self.pairs, self.heads, *x.shape[2:])

    def as_map(self, x: Tensor) -> Tensor:
        """(X, h, N, ...) -> (X, h, H, W, ...), a view."""
        return x.unflatten(2, self.grid_size)

    def tiles(self) -> Iterator[tuple[int, tuple[slice, slice, slice]]]:
        """(number, (pairs, rows, columns)) of each tile."""
        per_pair = self.heads * self.k.shape[2]
        rows, cols = _tile_shape(self.grid_size, per_pair)
        pairs = max(1, MAX_WEIGHTS // (per_pair * rows * cols))
        number = 0
        for p in range(0, self.pairs, pairs):
            for y in range(0, self.grid_size[0], rows):
                for x in range(0, self.grid_size[1], cols):
                    yield (
                        number,
                        (
                            slice(p, min(p + pairs, self.pairs)),
                            slice(y, min(y + rows, self.grid_size[0])),
                            slice(x, min(x + cols, self.grid_size[1])),
                        ),
                    )
                    number += 1

    def bias(self, tile: tuple[slice, slice, slice], with_slopes: bool) -> TileBias:
        pairs, *spans = tile
        taps = [
            axis_taps(
                self.pos[pairs, :, axis],
                span.start,
                span.stop - span.start,
                self.grid_size[axis],
                self.table_size[axis],
                with_slopes,
            )
            for axis, span in enumerate(spans)
        ]
        pair = torch.arange(pairs.start, pairs.stop, device=self.pos.device)
        head = torch.arange(self.heads, device=self.pos.device)
        heads = (pair % self.groups)[:, None] * self.heads + head
        return TileBias(self.table, heads, *taps)

    def cut(self, x: Tensor, tile: tuple[slice, slice, slice]) -> Tensor:
        """The tile of a map (X, h, H, W, ...) -> (x * h, r * c, ...)."""
        pairs, rows, cols = tile
        part = x[pairs, :, rows, cols].to(self.dtype)
        return part.flatten(2, 3).flatten(0, 1)

    def paste(self, x: Tensor, tile: tuple[slice, slice, slice], part: Tensor) -> None:
        """Inverse of :meth:`cut`."""
        pairs, rows, cols = tile
        target = x[pairs, :, rows, cols]
        target.copy_(part.reshape(target.shape))

    def keys(self, x: Tensor, tile: tuple[slice, slice, slice]) -> Tensor:
        """(X, h, S, D) -> (x * h, S, D)."""
        return x[tile[0]].flatten(0, 1)


def deform_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    rpb_table: Tensor,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
    pos_in_range: bool,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Hq, N, D), dtype of q, and lse (B, Hq, N), float32 or float64."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0:
        return out, q.new_empty(q.shape[:3], dtype=torch.float32)
    problem = _Problem(q, k, v, pos, rpb_table, grid_size)
    lse = torch.empty(q.shape[:3], dtype=problem.dtype, device=q.device)
    q_map, out_map, lse_map = (
        problem.as_map(problem.by_pair(t)) for t in (q, out, lse)
    )
    for number, tile in problem.tiles():
        bias = problem.bias(tile, with_slopes=False).value()
        drop = dropout_scale(bias.shape, dropout_p, seed + number, bias)
        tile_out, tile_lse = attend_tile(
            problem.cut(q_map, tile),
            problem.keys(problem.k, tile),
            problem.keys(problem.v, tile),
            bias,
            scale,
            drop,
        )
        problem.paste(out_map, tile, tile_out)
        problem.paste(lse_map, tile, tile_lse)
    return out, lse


def deform_attn_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    rpb_table: Tensor,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
    pos_in_range: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, pos and rpb_table, in their shapes and dtypes."""
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0:
        return grad_q, *(torch.zeros_like(t) for t in (k, v, pos, rpb_table))
    problem = _Problem(q, k, v, pos, rpb_table, grid_size)
    grad_k, grad_v = torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    grad_pos = problem.pos.new_zeros(problem.pos.shape)
    grad_table = torch.zeros_like(problem.table)
    maps = [problem.as_map(problem.by_pair(t)) for t in (grad_out, out, lse, q, grad_q)]
    for number, tile in problem.tiles():
        tile_bias = problem.bias(tile, with_slopes=True)
        bias = tile_bias.value()
        drop = dropout_scale(bias.shape, dropout_p, seed + number, bias)
        tile_grad_q, tile_grad_k, tile_grad_v, grad_bias = attend_tile_backward(
            *(problem.cut(m, tile) for m in maps[:4]),
            problem.keys(problem.k, tile),
            problem.keys(problem.v, tile),
            bias,
            scale,
            drop,
        )
        problem.paste(maps[4], tile, tile_grad_q)
        pairs = tile[0]
        grad_k[pairs] += tile_grad_k.view_as(grad_k[pairs])
        grad_v[pairs] += tile_grad_v.view_as(grad_v[pairs])
        grad_y, grad_x = tile_bias.backward(grad_bias, grad_table.view(-1))
        grad_pos[pairs, :, 0] += grad_y
        grad_pos[pairs, :, 1] += grad_x
    return (
        grad_q,
        _sum_groups(grad_k, k),
        _sum_groups(grad_v, v),
        grad_pos.reshape(pos.shape),
        grad_table[:, 1:-1, 1:-1].to(rpb_table.dtype).contiguous(),
    )


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    """(B * G, h, S, D) -> (B, Hkv, S, D): sums the query heads of a kv head."""
    batch, num_kv_heads, num_keys, head_dim = like.shape
    grad = grad.view(batch, num_kv_heads, -1, num_keys, head_dim)
    return grad.sum(2).to(like.dtype)
