"""Which patches of queries the programs of the deform_attn kernels take."""

import itertools

import pytest

pytest.importorskip('triton')

from deform_gqa.ops.triton_backend.patches import (
    MAX_WINDOW,
    choose_backward_patch,
    choose_patch,
    flat_patch,
    stacks,
)

DETECTION = dict(height=200, width=334, step_x=55 / 333)


def size(patch):
    return patch.heads * patch.rows * patch.cols


@pytest.mark.parametrize(
    ('heads', 'most', 'expected'),
    [(1, 8, [1]), (4, 8, [1, 2, 4]), (4, 2, [1, 2]), (6, 8, [1, 2]), (3, 8, [1])],
)
def test_stacks_divide_the_heads(heads, most, expected):
    assert stacks(heads, most) == expected


def test_stacked_heads_waste_less_of_the_border():
    """200 rows are 12.5 patches of 16 rows, but 25 of 8."""
    alone = choose_patch(256, **DETECTION)
    stacked = choose_patch(256, **DETECTION, heads=4)
    assert (alone.heads, alone.rows, alone.cols) == (1, 16, 16)
    assert (stacked.heads, stacked.rows, stacked.cols) == (2, 8, 16)


def test_stacked_heads_fill_the_tile_of_a_small_map():
    patch = choose_patch(256, 7, 7, 0.1, heads=8)
    assert patch.rows == patch.cols == 8 and patch.heads == 4
    assert flat_patch(256, 49, heads=8).heads == 4
    assert flat_patch(256, 1000, heads=8).heads == 1


@pytest.mark.parametrize('most', [32, 64, 128, 256])
def test_patches_fit(most):
    sizes, steps = (1, 7, 20, 200), (0.0, 0.17, 1.0, 5.0, 80.0)
    for height, width, step, heads in itertools.product(sizes, sizes, steps, (1, 4, 6)):
        patch = choose_patch(most, height, width, step, heads)
        assert 16 <= size(patch) <= most and patch.window <= MAX_WINDOW
        assert heads % patch.heads == 0
        backward = choose_backward_patch(most, height, width, step)
        assert size(backward) <= max(most, 64) and backward.window <= MAX_WINDOW
        assert backward.heads == 1
