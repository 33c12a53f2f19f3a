"""deform_sdpa where logits are far from 0, gradients large and tiles half empty."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdpa_cases import DeformSdpaCase, move_off_pixels
from shifted_cases import ATOL, Load, check_load, determinism, loads

from deform_gqa.ops import deform_sdpa
from deform_gqa.ops.deform_sdpa import block_sizes


@st.composite
def cases(draw) -> DeformSdpaCase:
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)]))
    return DeformSdpaCase(
        batch=1,
        query_views=1,
        heads=heads,
        kv_heads=kv_heads,
        groups=None,
        queries=draw(st.integers(1, 20)),
        views=draw(st.integers(1, 2)),
        points=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([8, 13, 32])),
        grid_size=draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        margin=0.0,  # off the map the logits are 0, and their slope that large
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def check(case: DeformSdpaCase, backend: str, dtype: torch.dtype, load: Load) -> None:
    inputs = case.inputs(dtype)
    move_off_pixels(case, inputs[3])
    attend = functools.partial(deform_sdpa, grid_size=case.grid_size)
    check_load(
        functools.partial(attend, backend=backend),
        functools.partial(attend, backend='naive'),
        inputs,
        load,
    )


@pytest.mark.parametrize('dtype', list(ATOL))
def test_torch(dtype):
    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(cases(), loads())
    def check_drawn(case, load):
        check(case, 'torch', dtype, load)

    check_drawn()


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter's time goes with the number of programs, not their size."""
    block_sizes.block_sizes.cache_clear()
    monkeypatch.setattr(block_sizes, 'WARPS', 8)
    yield
    block_sizes.block_sizes.cache_clear()


@pytest.mark.interpret
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_triton(dtype, large_tiles):
    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(cases(), loads())
    def check_drawn(case, load):
        check(case, 'triton', dtype, load)

    check_drawn()


@pytest.mark.interpret
@pytest.mark.parametrize('which', [0, 1, 2, 'grad'])
def test_infinities_show_in_fixed_point_sums(which, large_tiles):
    """Or a GradScaler would not notice."""
    case = DeformSdpaCase(1, 1, 1, 1, None, 3, 1, 2, 8, (2, 3), 0.0, False, 0)
    inputs = case.inputs(torch.float32)
    if which != 'grad':
        with torch.no_grad():
            inputs[which][..., 1] = float('inf')
    out = deform_sdpa(*inputs, grid_size=case.grid_size, backend='triton')
    grad = torch.ones_like(out)
    if which == 'grad':
        grad[..., 1] = float('inf')
    with determinism(True):
        _, grad_k, grad_v, _ = torch.autograd.grad(out, inputs, grad)
    assert not grad_k.isfinite().any()
    assert not grad_v.isfinite().any()


@pytest.mark.interpret
def test_fixed_point_holds_the_sum_of_all_queries(large_tiles):
    """Of one sign, on one pixel."""
    q = torch.zeros(1, 1, 4, 60, 8)
    k, v = torch.zeros(2, 1, 1, 1, 1, 8, requires_grad=True)
    coords = torch.zeros(1, 1, 60, 1, 1, 2)
    out = deform_sdpa(q, k, v, coords, grid_size=(1, 1), backend='triton')
    with determinism(True):
        (grad_v,) = torch.autograd.grad(out, v, torch.full_like(out, 7.0))
    assert (grad_v == 4 * 60 * 7).all()
