"""Which patches of queries the programs of the deform_attn kernels take."""

import itertools

import pytest

pytest.importorskip('triton')

from deform_gqa.ops.deform_attn.patches import (
    MAX_WINDOW,
    Patch,
    choose_backward_patch,
    choose_patch,
    flat_patch,
)

DETECTION = dict(height=200, width=334, step_x=55 / 333)


def test_large_maps_get_square_patches():
    assert choose_patch(256, **DETECTION) == Patch(16, 16, 8)
    assert flat_patch(256, 66800) == Patch(256, 1, 0)


def test_stacked_rows_fill_the_tile_of_a_small_map():
    """Eight heads of 7 rows are 56 rows."""
    patch = choose_patch(256, 8 * 7, 7, 0.1)
    assert patch.rows * patch.cols == 256
    assert flat_patch(256, 9) == Patch(16, 1, 0)


@pytest.mark.parametrize('most', [32, 64, 128, 256])
def test_patches_fit(most):
    sizes, steps = (1, 7, 20, 200), (0.0, 0.17, 1.0, 5.0, 80.0)
    for height, width, step in itertools.product(sizes, sizes, steps):
        for patch, limit in [
            (choose_patch(most, height, width, step), most),
            (choose_backward_patch(most, height, width, step), max(most, 64)),
        ]:
            assert 16 <= patch.rows * patch.cols <= limit
            assert patch.window <= MAX_WINDOW
