"""Checks of numbers where torch traces: symbols pass, ``True`` does not."""

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from deform_gqa.ops import (
    deform_attn,
    deform_sdpa,
    neighborhood_attn,
    scaled_dot_product_gqa,
)
from deform_gqa.ops.common import checks

Q = torch.rand(1, 2, 12, 8)
GRID = dict(grid_size=(3, 4))
WINDOW = dict(grid_size=(3, 4), kernel_size=3)
COORDS = torch.rand(1, 1, 12, 1, 2, 2)


@pytest.fixture
def symbols():
    """A symbolic integer and a symbolic float."""
    env = ShapeEnv()
    return env.create_unbacked_symint(), env.create_unbacked_symfloat()


def test_symbols(symbols):
    integer, number = symbols
    checks.check_int('side', integer)
    checks.check_number('scale', integer)
    checks.check_number('scale', number)
    with pytest.raises(TypeError, match=r'side must be an integer, got .* SymFloat'):
        checks.check_int('side', number)


def test_tensors_are_integers_under_jit_tracing_alone():
    side = torch.tensor(3)
    with pytest.raises(TypeError, match=r'side must be an integer, got tensor\(3\)'):
        checks.check_int('side', side)

    def checked(x):
        checks.check_int('side', x.shape[0])  # a tensor here
        for value in (True, 2.0, 'a'):
            with pytest.raises(TypeError, match='side must be an integer'):
                checks.check_int('side', value)
        return x.sum()

    torch.jit.trace(checked, (torch.rand(3),))


def test_numbers_that_change_in_a_compiled_call():
    def call(q, height, width, kernel_size):
        grid_size = (height, width)
        out = deform_attn(q, q, q, grid_size=grid_size, scale=kernel_size)
        return neighborhood_attn(
            out, q, q, grid_size=grid_size, kernel_size=kernel_size
        )

    compiled = torch.compile(call, backend='eager', fullgraph=True, dynamic=True)
    for height, width, kernel_size in ((3, 4, 3), (5, 7, 5), (9, 8, 7)):
        q = torch.rand(1, 2, height * width, 8)
        expected = call(q, height, width, kernel_size)
        actual = compiled(q, height, width, kernel_size)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ('op', 'inputs', 'options', 'message'),
    [
        (deform_attn, 3, dict(grid_size=(True, 12)), r'grid_size\[0\] .* integer'),
        (deform_attn, 3, dict(GRID, scale=True), 'scale .* number, got True'),
        (deform_attn, 3, dict(GRID, dropout_p=False), 'dropout_p .* number, got False'),
        (neighborhood_attn, 3, dict(WINDOW, kernel_size=True), 'kernel_size .* True'),
        (neighborhood_attn, 3, dict(WINDOW, dilation=True), 'dilation .* True'),
        (neighborhood_attn, 3, dict(WINDOW, dropout_p=True), 'dropout_p .* True'),
        (scaled_dot_product_gqa, 3, dict(scale=True), 'scale .* number, got True'),
        (scaled_dot_product_gqa, 3, dict(dropout=False), 'dropout .* got False'),
    ],
)
def test_true_is_no_number(op, inputs, options, message):
    with pytest.raises(TypeError, match=message):
        op(*[Q] * inputs, **options)


@pytest.mark.parametrize(
    'options', [dict(grid_size=(12, True)), dict(GRID, scale=True, dropout_p=0.5)]
)
def test_true_is_no_number_of_deform_sdpa(options):
    q = Q[:, None]
    with pytest.raises(TypeError, match=r'must be .* got True of type bool'):
        deform_sdpa(q, q, q, COORDS, **options)
