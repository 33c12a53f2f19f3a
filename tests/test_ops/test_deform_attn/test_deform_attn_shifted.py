"""deform_attn where logits are far from 0, gradients large and tiles half empty."""

import functools

import pytest
import torch
from cases import DeformAttnCase, draw_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from shifted_cases import ATOL, Load, check_load, check_scaled, determinism, loads
from torch.testing import assert_close
from triton_cases import SIZES, tile_sizes

from deform_gqa.ops import deform_attn

CASE = DeformAttnCase(
    batch=1,
    heads=1,
    kv_heads=1,
    groups=1,
    grid_size=(16, 16),
    keys=3,
    head_dim=16,
    table_size=(5, 5),
    reach=0.9,
    strided=False,
    seed=0,
)
KINDS = ['none', 'coarse', 'fine']


@st.composite
def cases(draw, tile: int = 16, most: int = 9) -> DeformAttnCase:
    """The last tile of keys holds 1 to ``tile`` - 1; maps of at most ``most`` rows."""
    height, width = draw(st.integers(1, most)), draw(st.integers(1, 2 * most))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    kind = draw(st.sampled_from(KINDS))
    tables = {'none': None, 'coarse': (3, 4), 'fine': (2 * height - 1, 2 * width - 1)}
    return DeformAttnCase(
        batch=1,
        heads=heads,
        kv_heads=kv_heads,
        groups=1,
        grid_size=(height, width),
        keys=tile * draw(st.integers(0, 1)) + draw(st.integers(1, tile - 1)),
        head_dim=draw(st.sampled_from([8, 16, 24])),
        table_size=tables[kind],
        reach=draw(st.sampled_from([0.9, 1.7])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def check(case: DeformAttnCase, backend: str, dtype: torch.dtype, load: Load) -> None:
    attend = functools.partial(
        deform_attn, grid_size=case.grid_size, pos_in_range=case.reach <= 1
    )
    check_load(
        functools.partial(attend, backend=backend),
        functools.partial(attend, backend='naive'),
        draw_inputs(case, dtype),
        load,
    )


@pytest.mark.parametrize('dtype', list(ATOL))
def test_torch(dtype):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(cases(), loads())
    def check_drawn(case, load):
        check(case, 'torch', dtype, load)

    check_drawn()


@pytest.mark.interpret
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_triton(dtype):
    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(st.data(), st.sampled_from([SIZES[0], SIZES[2]]), loads())
    def check_drawn(data, sizes, load):
        case = data.draw(cases(sizes.keys, most=4))
        with tile_sizes(sizes):
            check(case, 'triton', dtype, load)

    check_drawn()


BACKENDS = ['torch', pytest.param('triton', marks=pytest.mark.interpret)]


@pytest.mark.parametrize('shift', [-300, 300])
@pytest.mark.parametrize('backend', BACKENDS)
def test_shift_in_the_table(backend, shift):
    """It reaches queries off the map as well, whose q k^T is 0."""
    case = DeformAttnCase(1, 2, 1, 1, (3, 5), 18, 8, (3, 4), 0.9, False, 0)
    inputs = draw_inputs(case, torch.float32)
    with torch.no_grad():
        inputs[4].add_(shift)
    attend = functools.partial(deform_attn, grid_size=case.grid_size)
    with tile_sizes(SIZES[2]):
        check_scaled(
            functools.partial(attend, backend=backend),
            functools.partial(attend, backend='naive'),
            inputs,
            Load(shift, loss_scale=1024, deterministic=False),
        )


@pytest.mark.interpret
def test_table_beyond_float16():
    """Cells next to one that hides keys are a weight of 0 away from infinity."""
    case = DeformAttnCase(1, 1, 1, 1, (2, 3), 3, 8, (9, 9), 0.9, False, 0)
    inputs = draw_inputs(case, torch.float16)
    with torch.no_grad():
        inputs[4][:, 4, 4] = -1e6
    out = deform_attn(*inputs, grid_size=case.grid_size, backend='triton')
    assert out.isfinite().all()


def run_large(backend, grad, inputs):
    out = deform_attn(*inputs, grid_size=CASE.grid_size, backend=backend)
    return torch.autograd.grad(out, inputs, torch.full_like(out, grad))


@pytest.mark.interpret
@pytest.mark.parametrize('deterministic', [False, True])
def test_sums_over_a_patch_exceed_float16(deterministic):
    """d(logit) of one sign: each of them is a float16, not their sum over columns."""
    inputs = draw_inputs(CASE, torch.float16)
    with torch.no_grad():
        inputs[0].mul_(0.1)
        inputs[2].fill_(-4)
        inputs[2][:, :, 0] = 4
        inputs[4].mul_(0.1)
    with determinism(deterministic), tile_sizes(SIZES[2]):
        actual = run_large('triton', 800.0, inputs)
    expected = run_large('naive', 800.0, inputs)
    assert expected[4].abs().max() > 1e5
    for a, e in zip(actual[3:], expected[3:], strict=True):  # of pos and the table
        assert_close(a, e, rtol=1e-3, atol=2e-3 * e.abs().max().item())


@pytest.mark.interpret
@pytest.mark.parametrize('which', [0, 1, 2, 'grad'])
def test_infinities_show_in_fixed_point_sums(which):
    """Or a GradScaler would not notice."""
    case = DeformAttnCase(1, 1, 1, 1, (2, 3), 3, 8, (3, 4), 0.9, False, 0)
    inputs = draw_inputs(case, torch.float32)
    if which != 'grad':
        with torch.no_grad():
            inputs[which][0, 0, 1, 2] = float('inf')
    out = deform_attn(*inputs, grid_size=case.grid_size, backend='triton')
    grad = torch.ones_like(out)
    if which == 'grad':
        grad[0, 0, 1, 2] = float('inf')
    with determinism(True):
        assert not torch.autograd.grad(out, inputs, grad)[4].isfinite().any()
