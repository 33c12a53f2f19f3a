"""Tiles of the neighborhood_attn kernels."""

import pytest

pytest.importorskip('triton')

from deform_gqa.ops.neighborhood_attn.patches import choose_tile


@pytest.mark.parametrize('kernel_size', [3, 5, 7, 9, 11, 13, 15, 21, 33, 65])
@pytest.mark.parametrize('owned', [16, 32, 64, 128])
@pytest.mark.parametrize('walked', [16, 32, 64, 128])
@pytest.mark.parametrize('row_pairs', [1, 16])
def test_tiles(kernel_size, owned, walked, row_pairs):
    for height, width in ((200, 334), (kernel_size, kernel_size + 1)):
        tile = choose_tile(owned, walked, height, width, kernel_size, row_pairs)
        assert tile.rows * tile.cols == owned
        assert tile.rows * tile.walk_rows >= row_pairs
        # A walked tile is as wide as the keys that an inner patch sees.
        assert tile.cols + kernel_size - 1 <= tile.walk_cols
        assert tile.walked == walked or tile.walk_rows == 1


@pytest.mark.parametrize(
    ('kernel_size', 'expected'),
    [(7, (8, 8, 4, 16)), (9, (8, 8, 4, 16)), (13, (16, 4, 4, 16))],
)
def test_large_maps(kernel_size, expected):
    tile = choose_tile(64, 64, 200, 334, kernel_size)
    assert (tile.rows, tile.cols, tile.walk_rows, tile.walk_cols) == expected
