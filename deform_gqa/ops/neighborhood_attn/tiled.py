"""Neighborhood attention by dense tiles, exact, with bounded memory.

A tile of about 4 x 8 queries attends densely to the halo of keys that any of them
sees; the bias is rpb inside a query's window and -inf outside. Only the distinct
(border and interior) tiles have a bias of their own. Dilation splits a map into
interleaved sub-maps without dilation. A NaN or an infinity in k or v reaches all
queries of the tiles that see it.
"""

import torch
from torch import Tensor

from ..common.layout import empty_tokens_like
from ..common.tile_attention import (
    attend_tile,
    attend_tile_backward,
    dropout_scale,
    with_lse,
    with_ones,
    with_row_sums,
)
from .tiled_map import Chunk, TiledMap


def _sub_maps(grid_size: tuple[int, int], dilation: int, *tensors: Tensor):
    """Views (B, h, H', W', D) of (B, h, N, D), one tuple for each phase of dilation."""
    maps = [x.unflatten(2, grid_size) for x in tensors]
    for row in range(dilation):
        for col in range(dilation):
            yield tuple(x[:, :, row::dilation, col::dilation] for x in maps)


def neighborhood_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    *,
    seed: int,
    grid_size: tuple[int, int],
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`deform_gqa.ops.neighborhood_attn`; arguments are checked there.

    Returns:
        out (B, Hq, N, D), dtype of q, and lse (B, Hq, N), float32 (float64 for
        float64 q).
    """
    out = empty_tokens_like(q)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(*q.shape[:3], 1, dtype=dtype)
    for q_map, k_map, v_map, out_map, lse_map in _sub_maps(
        grid_size, dilation, q, k, v, out, lse
    ):
        tiled = TiledMap(q_map, k_map, rpb, kernel_size)
        for chunk in tiled.chunks(seed):
            bias = tiled.bias_tiles(chunk)
            drop = dropout_scale(bias.shape, dropout_p, chunk.seed, bias)
            tile_out, tile_lse = attend_tile(
                tiled.query_tiles(q_map, chunk),
                tiled.key_tiles(k_map, chunk),
                tiled.key_tiles(v_map, chunk),
                bias,
                scale,
                drop,
            )
            tiled.write_queries(out_map, tile_out, chunk)
            tiled.write_queries(lse_map, tile_lse.unsqueeze(-1), chunk)
            seed = chunk.seed + 1
    return out, lse.squeeze(-1)


def neighborhood_attn_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    *,
    seed: int,
    grid_size: tuple[int, int],
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and rpb (empty without rpb), in the inputs' dtypes."""
    dq = empty_tokens_like(q)
    dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v)
    )
    drpb = 0.0
    for maps in _sub_maps(
        grid_size, dilation, q, k, v, grad_out, out, lse.unsqueeze(-1), dq, dk, dv
    ):
        q_map, k_map, *_, dk_map, dv_map = maps
        tiled = TiledMap(q_map, k_map, rpb, kernel_size)
        padded_dk = tiled.new_padded_keys(k.shape[-1])
        padded_dv = tiled.new_padded_keys(k.shape[-1])
        grad_bias = None if rpb is None else torch.zeros_like(tiled.bias).flatten(2)
        for chunk in tiled.chunks(seed):
            _backward_chunk(
                tiled, chunk, maps, padded_dk, padded_dv, grad_bias, scale, dropout_p
            )
            seed = chunk.seed + 1
        tiled.write_keys(dk_map, padded_dk)
        tiled.write_keys(dv_map, padded_dv)
        if rpb is not None:
            drpb = drpb + tiled.reduce_bias(grad_bias)
    return dq, dk, dv, q.new_empty(0) if rpb is None else drpb.to(rpb.dtype)


def _backward_chunk(
    tiled: TiledMap,
    chunk: Chunk,
    maps: tuple[Tensor, ...],
    padded_dk: Tensor,
    padded_dv: Tensor,
    grad_bias: Tensor | None,
    scale: float,
    dropout_p: float,
) -> None:
    """Write dq of one chunk of tiles, and add to the other gradients."""
    q_map, k_map, v_map, grad_out_map, out_map, lse_map, dq_map, _, _ = maps
    bias = tiled.bias_tiles(chunk)
    drop = dropout_scale(bias.shape, dropout_p, chunk.seed, bias)
    # Queries outside the map get weights of exp(-inf).
    lse = tiled.query_tiles(lse_map, chunk, fill=torch.inf).squeeze(-1)
    tile_dq, tile_dk, tile_dv, tile_dbias = attend_tile_backward(
        with_lse(tiled.query_tiles(q_map, chunk), lse, scale),
        with_row_sums(
            tiled.query_tiles(grad_out_map, chunk), tiled.query_tiles(out_map, chunk)
        ),
        with_ones(tiled.key_tiles(k_map, chunk)),
        with_ones(tiled.key_tiles(v_map, chunk)),
        bias,
        scale,
        drop,
    )
    tiled.write_queries(dq_map, tile_dq, chunk)
    tiled.add_keys(padded_dk, tile_dk, chunk)
    tiled.add_keys(padded_dv, tile_dv, chunk)
    if grad_bias is not None:
        tiled.add_bias_gradient(grad_bias, tile_dbias, chunk)
