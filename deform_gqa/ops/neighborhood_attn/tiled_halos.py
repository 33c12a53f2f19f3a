"""Tiles of queries and the halos of keys they see, for neighborhood attention.

Each axis is cut by itself: equal tiles of queries, equal halos one tile apart, on a
map that is padded where the first and the last of them stick out. Regular strides
make every gather a strided view and every scatter a sum of slices, which is
deterministic on all devices.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.tile_attention import LOG2E
from .naive import window_start

# Sides of a tile of queries. Measured on a CPU for K = 3, 7 and 13: small tiles waste
# fewer masked keys, large ones make better matrix products.
TILE_HEIGHT = 4
TILE_WIDTH = 8
# A side of at most this may become one tile.
_LONGEST_TILE = 16


@dataclass(frozen=True, eq=False)
class TiledAxis:
    """One axis of ``size`` places, cut into tiles.

    Tile i holds queries [i * tile, (i + 1) * tile) - query_pad and sees keys
    [i * tile, i * tile + halo) - key_pad; both may lie outside the map.

    ``patterns`` (P, halo, tile) are the distinct tables of the relative offset + K - 1
    of (key, query), -1 where the query does not see the key; ``pattern_ids``
    (num_tiles,) says which one each tile has. Both int64, on the CPU.
    """

    size: int
    tile: int
    num_tiles: int
    halo: int
    query_pad: int
    key_pad: int
    patterns: Tensor
    pattern_ids: Tensor

    @property
    def padded_keys(self) -> int:
        return (self.num_tiles - 1) * self.tile + self.halo

    def query_range(self, tiles: range) -> tuple[int, int]:
        start = tiles.start * self.tile - self.query_pad
        return start, start + len(tiles) * self.tile

    def key_range(self, tiles: range) -> tuple[int, int]:
        start = tiles.start * self.tile - self.key_pad
        return start, start + (len(tiles) - 1) * self.tile + self.halo


@functools.lru_cache(maxsize=256)
def cut_axis(size: int, kernel_size: int, max_tile: int) -> TiledAxis:
    """Cut an axis of ``size`` >= ``kernel_size`` places into tiles.

    Tiles are ``max_tile`` long at most, but for an axis that is a single tile.
    """
    cuts = [_geometry(size, kernel_size, -(-size // max_tile))]
    if size <= _LONGEST_TILE:
        cuts.append(_geometry(size, kernel_size, 1))
    tile, num_tiles, halo, query_pad, key_pad = min(
        cuts,
        key=lambda cut: cut[0] * cut[1] * cut[2],  # pairs of query and key
    )
    keys = torch.arange(halo, device='cpu')[:, None] - key_pad
    queries = torch.arange(tile, device='cpu') - query_pad
    first = torch.arange(num_tiles, device='cpu')[:, None, None] * tile
    keys, queries = keys + first, (queries + first).clamp(0, size - 1)
    starts = window_start(size, kernel_size, 1, 'cpu')[queries]
    seen = (keys >= starts) & (keys < starts + kernel_size)
    offsets = torch.where(seen, keys - queries + kernel_size - 1, -1)
    patterns, pattern_ids = offsets.unique(dim=0, return_inverse=True)
    return TiledAxis(
        size, tile, num_tiles, halo, query_pad, key_pad, patterns, pattern_ids
    )


def _geometry(size: int, kernel_size: int, num_tiles: int) -> tuple[int, ...]:
    """(tile, num_tiles, halo, query_pad, key_pad) of a cut into about ``num_tiles``."""
    tile = -(-size // num_tiles)
    num_tiles = -(-size // tile)
    if num_tiles == 1:
        return tile, 1, tile, 0, 0
    pad = num_tiles * tile - size
    query_pad = pad // 2
    # A tile sees K // 2 keys on either side, unless its queries at a border are so
    # few that their clamped windows, K keys from the border, reach further.
    before = max(kernel_size // 2, kernel_size - (tile - (pad - query_pad)))
    after = max(kernel_size // 2, kernel_size - (tile - query_pad))
    return tile, num_tiles, before + tile + after, query_pad, query_pad + before


def crop(
    x: Tensor, rows: tuple[int, int], cols: tuple[int, int], fill: float = 0.0
) -> Tensor:
    """x (B, h, H, W, D) within (start, stop) ranges, ``fill`` outside the map."""
    height, width = x.shape[2:4]
    pad = (
        0,
        0,
        max(-cols[0], 0),
        max(cols[1] - width, 0),
        max(-rows[0], 0),
        max(rows[1] - height, 0),
    )
    x = x[:, :, max(rows[0], 0) : rows[1], max(cols[0], 0) : cols[1]]
    return F.pad(x, pad, value=fill) if any(pad) else x


def write_inside(
    target: Tensor, x: Tensor, rows: tuple[int, int], cols: tuple[int, int]
) -> None:
    """Inverse of :func:`crop`: write what of x lies inside the map ``target``."""
    row, col = max(rows[0], 0), max(cols[0], 0)
    part = target[:, :, row : rows[1], col : cols[1]]
    row, col = row - rows[0], col - cols[0]
    part.copy_(x[:, :, row : row + part.shape[2], col : col + part.shape[3]])


def gather_halos(x: Tensor, axis_y: TiledAxis, axis_x: TiledAxis) -> Tensor:
    """Cropped keys (b, h, rows, cols, D) -> (b * h * tiles, halo_y * halo_x, D)."""
    halos = x.unfold(2, axis_y.halo, axis_y.tile).unfold(3, axis_x.halo, axis_x.tile)
    halos = halos.movedim(4, -1)
    return halos.reshape(-1, axis_y.halo * axis_x.halo, x.shape[-1])


def add_halos(
    padded: Tensor,
    halos: Tensor,
    rows: range,
    cols: range,
    axis_y: TiledAxis,
    axis_x: TiledAxis,
) -> None:
    """Transpose of :func:`gather_halos`, of the tiles ``rows`` x ``cols``.

    Halos overlap, but not those that are ``skip`` tiles apart: all of these are added
    through one view.

    Args:
        padded: (b, h, padded_keys of axis_y, those of axis_x, D), added to.
        halos: (b * h * tiles, halo_y * halo_x, D).
    """
    halos = halos.view(
        *padded.shape[:2], len(rows), len(cols), axis_y.halo, axis_x.halo, -1
    )
    skip_y, skip_x = (-(-axis.halo // axis.tile) for axis in (axis_y, axis_x))
    for j in range(min(skip_y, len(rows))):
        for i in range(min(skip_x, len(cols))):
            part = halos[:, :, j::skip_y, i::skip_x]
            top, left = (rows[j] * axis_y.tile, cols[i] * axis_x.tile)
            target = padded[:, :, top:, left:]
            target = target.unfold(2, axis_y.halo, skip_y * axis_y.tile)
            target = target.unfold(3, axis_x.halo, skip_x * axis_x.tile)
            target = target[:, :, : part.shape[2], : part.shape[3]]
            target.movedim(4, -1).add_(part)


def bias_table(
    rpb: Tensor | None, groups: int, axis_y: TiledAxis, axis_x: TiledAxis, like: Tensor
) -> Tensor:
    """Bias of the distinct tiles, -inf where a query does not see a key.

    Args:
        rpb: (Hq, 2K-1, 2K-1) or None.
        groups: Hq // Hkv.
        like: Gives device and dtype of the result.

    Returns:
        (Hkv, patterns of y x patterns of x, keys, groups * queries) with the keys of
        a halo and the queries of a tile; Hkv is 1 without ``rpb``.
    """
    # (Py, Px, keys y, keys x, queries y, queries x)
    rows = axis_y.patterns.to(like.device)[:, None, :, None, :, None]
    cols = axis_x.patterns.to(like.device)[None, :, None, :, None, :]
    hidden = (rows < 0) | (cols < 0)
    if rpb is None:
        bias = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        bias = bias[None, None].expand(1, groups, *hidden.shape)
    else:
        bias = (rpb.to(like.dtype) * LOG2E)[:, rows.clamp(min=0), cols.clamp(min=0)]
        bias = bias.masked_fill_(hidden, -torch.inf).unflatten(0, (-1, groups))
    bias = bias.movedim(1, 5)  # the query heads of a group stand beside the queries
    return bias.flatten(5).flatten(3, 4).flatten(1, 2).contiguous()


def reduce_bias_table(
    grad: Tensor, groups: int, kernel_size: int, axis_y: TiledAxis, axis_x: TiledAxis
) -> Tensor:
    """Transpose of :func:`bias_table`: gradient of rpb (Hq, 2K-1, 2K-1)."""
    bins = 2 * kernel_size - 1
    # An offset of -1 matches no bin, so hidden pairs add nothing.
    one_hot_y, one_hot_x = (
        (axis.patterns.unsqueeze(-1) == torch.arange(bins, device='cpu')).to(grad)
        for axis in (axis_y, axis_x)
    )
    num_y, keys_y, queries_y, _ = one_hot_y.shape
    num_x, keys_x, queries_x, _ = one_hot_x.shape
    grad = grad.view(
        -1, num_y, num_x, keys_y, keys_x, groups, queries_y, queries_x
    ).permute(0, 5, 1, 3, 6, 2, 4, 7)
    grad = grad.flatten(0, 1).flatten(1, 3).flatten(2)  # (Hq, y pairs, x pairs)
    return one_hot_y.flatten(0, 2).T @ (grad @ one_hot_x.flatten(0, 2))
