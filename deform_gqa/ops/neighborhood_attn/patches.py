"""Which tiles the neighborhood_attn kernels work on (host side, pure).

A program owns a patch of the map and walks over the places that windows connect with
it: a rectangle that sticks out by K // 2 on each side.
"""

import dataclasses
import functools


@dataclasses.dataclass(frozen=True)
class NeighborhoodTile:
    """A patch of rows x cols places and a walked tile of walk_rows x walk_cols."""

    rows: int
    cols: int
    walk_rows: int
    walk_cols: int

    @property
    def walked(self) -> int:
        return self.walk_rows * self.walk_cols


def _pairs(tile: NeighborhoodTile, height: int, width: int, kernel_size: int) -> int:
    """(owned, walked) pairs of the whole map, padding and hidden ones included."""
    patches = -(-height // tile.rows) * -(-width // tile.cols)
    walks = -(-(tile.rows + kernel_size - 1) // tile.walk_rows)
    return patches * tile.rows * tile.cols * walks * tile.walked


@functools.cache
def choose_tile(
    owned: int,
    walked: int,
    height: int,
    width: int,
    kernel_size: int,
    row_pairs: int = 1,
) -> NeighborhoodTile:
    """The tile with the fewest pairs: ``owned`` places and, as a rule, ``walked``.

    One walked tile spans all columns that an inner patch needs; windows that are
    wider than ``walked`` get walked tiles of one row.

    Args:
        owned, walked: Powers of two, at least 16.
        height, width: Of the map (of a sub-map, with dilation).
        row_pairs: Least number of (row of the patch, row of the walked tile), at most
            ``owned``.
    """
    reach = kernel_size - 1
    widest = max(walked, 1 << (kernel_size - 1).bit_length())
    candidates = [
        NeighborhoodTile(owned // cols, cols, max(1, walked // walk_cols), walk_cols)
        for cols in (1 << i for i in range(owned.bit_length()))
        for walk_cols in (1 << i for i in range(3, widest.bit_length()))
        if cols + reach <= walk_cols
    ]
    return min(
        (
            tile
            for tile in candidates
            if tile.rows * tile.walk_rows >= row_pairs and tile.walked >= walked
        ),
        key=lambda tile: _pairs(tile, height, width, kernel_size),
    )
