"""deform_sdpa's Triton kernels on the CPU, by the interpreter."""

import dataclasses

import pytest
import torch
from cases import output_and_gradients
from drawn_sdpa_cases import small_sdpa_cases
from golden import assert_close as assert_golden
from golden import load_golden
from hypothesis import given, settings
from sdpa_cases import DeformSdpaCase, move_off_pixels
from torch.testing import assert_close

pytest.importorskip('triton')

from triton_cases import assert_as_good_as, poisoned_memory, to_double

from deform_gqa.ops import deform_sdpa
from deform_gqa.ops.common import triton_host
from deform_gqa.ops.deform_sdpa import block_sizes
from deform_gqa.ops.deform_sdpa.api import deform_sdpa_op

pytestmark = pytest.mark.interpret

ATOL = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
CASE = DeformSdpaCase(
    batch=1,
    query_views=2,
    heads=4,
    kv_heads=2,
    groups=None,
    queries=5,
    views=2,
    points=2,
    head_dim=8,
    grid_size=(5, 7),
    margin=0.2,
    strided=False,
    seed=0,
)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter's time goes with the number of programs, not their size."""
    block_sizes.block_sizes.cache_clear()
    monkeypatch.setattr(block_sizes, 'WARPS', 8)
    yield
    block_sizes.block_sizes.cache_clear()


def run(case, backend, inputs, **options):
    def op(*tensors):
        return deform_sdpa(
            *tensors, grid_size=case.grid_size, backend=backend, **options
        )

    return output_and_gradients(op, inputs)


def check(case, dtype):
    inputs = case.inputs(dtype)
    move_off_pixels(case, inputs[3])
    with poisoned_memory():
        actual = run(case, 'triton', inputs)
    expected = run(case, 'naive', inputs)
    exact = run(case, 'naive', to_double(inputs))
    assert_as_good_as(actual, expected, exact, ATOL[dtype])


# Two of each so that both workers of pytest-xdist have something to do.
@pytest.mark.parametrize('half', [0, 1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_equals_naive(dtype, half):
    @settings(max_examples=45, deadline=None, derandomize=True, database=None)
    @given(small_sdpa_cases())
    def check_drawn(case):
        check(dataclasses.replace(case, seed=2 * case.seed + half), dtype)

    check_drawn()


def test_equals_naive_in_tiles_of_one_warp(monkeypatch):
    monkeypatch.setattr(block_sizes, 'WARPS', 1)
    check(dataclasses.replace(CASE, queries=11, kv_heads=1), torch.float32)


@pytest.mark.parametrize('head_dim', [96, 256])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_head_dims(head_dim, dtype):
    check(dataclasses.replace(CASE, head_dim=head_dim), dtype)


def test_bfloat16():
    """These kernels have no ``tl.dot``, which the interpreter computes wrongly."""
    case = dataclasses.replace(CASE, heads=8, kv_heads=1, head_dim=32)
    check(case, torch.bfloat16)


@pytest.mark.parametrize(('heads', 'dtype'), [(4, torch.float16), (8, torch.float32)])
def test_tiles_of_new_gpus(monkeypatch, heads, dtype):
    """More heads and atomics of four numbers; else the interpreter takes old ones."""
    monkeypatch.setattr(triton_host, 'architecture', lambda device: 90)
    case = dataclasses.replace(CASE, heads=heads, kv_heads=1, head_dim=24)
    check(case, dtype)


@pytest.mark.parametrize(('heads', 'kv_heads'), [(12, 1), (24, 2)])
def test_units_of_several_blocks(heads, kv_heads):
    """More query heads share a sample than one program holds."""
    case = dataclasses.replace(CASE, heads=heads, kv_heads=kv_heads)
    check(case, torch.float32)


def test_groups_and_kv_heads_that_do_not_nest():
    case = dataclasses.replace(CASE, heads=6, kv_heads=2, groups=3)
    check(case, torch.float32)


@pytest.mark.parametrize('name', ['deform_sdpa_1view', 'deform_sdpa_2views'])
def test_equals_published(name):
    config, arrays = load_golden(name)
    inputs = [arrays[n].clone().requires_grad_() for n in ('q', 'k', 'v', 'coords')]
    out = deform_sdpa(
        *inputs,
        grid_size=(config['height'], config['width']),
        scale=config['sm_scale'],
        backend='triton',
    )
    grads = torch.autograd.grad(out, inputs, arrays['gy'])
    assert_golden('y', out, arrays['y'])
    for n, grad in zip(('q', 'k', 'v', 'coords'), grads, strict=True):
        assert_golden(n, grad, arrays[f'grad_{n}'])


def test_pixel_centres_and_borders():
    """Sizes of a power of two plus one: coordinates of the centres are exact."""
    case = dataclasses.replace(CASE, grid_size=(5, 9), views=1, points=9)
    inputs = case.inputs(torch.float32)
    rows, cols = torch.meshgrid(
        torch.linspace(0, 1, 5), torch.linspace(0, 1, 9), indexing='ij'
    )
    with torch.no_grad():
        inputs[3].copy_(torch.stack((cols, rows), -1)[:, None])
    actual = run(case, 'triton', inputs)
    for a, e in zip(actual, run(case, 'naive', inputs), strict=True):
        assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('value', [float('inf'), -float('inf'), float('nan'), 1e30])
def test_coordinates_that_are_no_place(value):
    """They read zeros, and gradients stay finite."""
    results = []
    for replacement in (value, 5.0):
        inputs = CASE.inputs(torch.float32)
        with torch.no_grad():
            inputs[3][..., 1, 0] = replacement
        results.append(run(CASE, 'triton', inputs))
    for a, e in zip(*results, strict=True):
        assert_close(a, e)


def test_deterministic_mode():
    inputs = CASE.inputs(torch.float32)
    expected = run(CASE, 'triton', inputs)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(CASE, 'triton', inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, e in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert_close(a, e)


def test_dropout():
    """The same mask in backward as in forward: a directional derivative agrees."""
    inputs = CASE.inputs(torch.float32)
    move_off_pixels(CASE, inputs[3])

    def op(*tensors):
        torch.manual_seed(3)
        return deform_sdpa(
            *tensors, grid_size=CASE.grid_size, dropout_p=0.4, backend='triton'
        )

    out = op(*inputs)
    assert torch.equal(out, op(*inputs))
    plain = deform_sdpa(*inputs, grid_size=CASE.grid_size, backend='triton')
    assert not torch.allclose(out, plain)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    for i, step in enumerate((1e-2, 1e-2, 1e-2, 1e-4)):
        direction = torch.randn(inputs[i].shape, generator=generator)
        values = []
        for sign in (1, -1):
            moved = [x.detach() for x in inputs]
            moved[i] = moved[i] + sign * step * direction
            values.append((op(*moved).double() * weight.double()).sum())
        slope = (values[0] - values[1]) / (2 * step)
        expected = (grads[i].double() * direction.double()).sum()
        assert_close(
            slope, expected, rtol=0.03, atol=0.03 * len(grads[i].flatten()) ** 0.5
        )


def test_empty_batch():
    inputs = [x.detach()[:0].requires_grad_() for x in CASE.inputs(torch.float32)]
    out, *grads = run(CASE, 'triton', inputs)
    assert out.shape == inputs[0].shape
    assert [g.shape for g in grads] == [x.shape for x in inputs]


def test_opcheck():
    case = dataclasses.replace(CASE, queries=2, points=1)
    inputs = [
        x.detach().unsqueeze(2).requires_grad_() if x.ndim == 6 else x
        for x in case.inputs(torch.float32)
    ]
    options = (*case.grid_size, 0.3, 0.0, 'triton')
    torch.library.opcheck(deform_sdpa_op, (*inputs, None, *options))
