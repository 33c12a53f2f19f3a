"""deform_sdpa: every backend that runs here against its definition."""

import dataclasses

import pytest
import torch
from cases import output_and_gradients
from drawn_sdpa_cases import deform_sdpa_cases
from golden import assert_close as assert_golden
from golden import load_golden
from hypothesis import given, settings
from sdpa_cases import DeformSdpaCase
from torch.testing import assert_close

from deform_gqa.ops import deform_sdpa
from deform_gqa.ops.deform_sdpa import tiled as torch_impl

CASE = DeformSdpaCase(
    batch=2,
    query_views=2,
    heads=4,
    kv_heads=2,
    groups=2,
    queries=7,
    views=2,
    points=3,
    head_dim=8,
    grid_size=(5, 7),
    margin=0.2,
    strided=False,
    seed=0,
)
# Numerical differentiation calls the op twice for each input element.
TINY = dataclasses.replace(
    CASE, batch=1, queries=2, views=1, points=2, head_dim=2, grid_size=(2, 3)
)
METHODS = ('dense', 'gather')


def run(case, backend, dtype=torch.float64, inputs=None, **options):
    def op(*tensors):
        return deform_sdpa(
            *tensors, grid_size=case.grid_size, backend=backend, **options
        )

    return output_and_gradients(op, case.inputs(dtype) if inputs is None else inputs)


def assert_all_close(actual, expected, tolerance=1e-9):
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=METHODS)
def method(request, monkeypatch):
    monkeypatch.setattr(torch_impl, 'choose_method', lambda *sizes: request.param)
    return request.param


def check_golden(name, backend):
    config, arrays = load_golden(name)
    inputs = [arrays[n].clone().requires_grad_() for n in ('q', 'k', 'v', 'coords')]
    out = deform_sdpa(
        *inputs,
        grid_size=(config['height'], config['width']),
        scale=config['sm_scale'],
        backend=backend,
    )
    grads = torch.autograd.grad(out, inputs, arrays['gy'])
    assert_golden('y', out, arrays['y'])
    for n, grad in zip(('q', 'k', 'v', 'coords'), grads, strict=True):
        assert_golden(n, grad, arrays[f'grad_{n}'])


@pytest.mark.parametrize('name', ['deform_sdpa_1view', 'deform_sdpa_2views'])
def test_naive_equals_published(name):
    check_golden(name, 'naive')


@pytest.mark.parametrize('name', ['deform_sdpa_1view', 'deform_sdpa_2views'])
def test_torch_equals_published(name, method):
    check_golden(name, 'torch')


@settings(max_examples=75, deadline=None)
@given(case=deform_sdpa_cases())
@pytest.mark.parametrize('name', METHODS)
def test_torch_equals_naive(name, case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_impl, 'choose_method', lambda *sizes: name)
        actual = run(case, 'torch')
    assert_all_close(actual, run(case, 'naive'))


@pytest.mark.parametrize('most', [1, 700, 2**18])
def test_size_of_chunks_does_not_matter(monkeypatch, method, most):
    monkeypatch.setitem(torch_impl.MAX_NUMBERS, method, most)
    assert_all_close(run(CASE, 'torch'), run(CASE, 'naive'))


def test_method_is_chosen_by_size():
    assert torch_impl.choose_method(14 * 14, 12, 1) == 'dense'
    assert torch_impl.choose_method(14 * 14, 12, 8) == 'gather'
    assert torch_impl.choose_method(100 * 167, 12, 1) == 'gather'
    assert torch_impl.choose_method(14 * 14, 1, 1) == 'gather'


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(case=deform_sdpa_cases())
@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype, name, case):
    """At most twice the error that naive makes in the same precision."""
    low = case.inputs(dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in low]
    exact = run(case, 'naive', inputs=exact_inputs)
    naive = run(case, 'naive', inputs=low)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_impl, 'choose_method', lambda *sizes: name)
        actual = run(case, 'torch', inputs=low)
    atol = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for a, n, e in zip(actual, naive, exact, strict=True):
        error = (a.double() - e).abs().max()
        allowed = 2 * (n.double() - e).abs().max() + atol * e.abs().max().clamp(min=1)
        assert error <= allowed


def off_the_grid(inputs):
    """Coordinates away from pixel centres, where there is no derivative."""
    with torch.no_grad():
        coords = inputs[3]
        values = torch.linspace(-0.113, 1.097, coords.numel(), dtype=torch.float64)
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
        coords.copy_(values[order].view_as(coords))
    return inputs


@pytest.mark.parametrize('dropout_p', [0.0, 0.4])
def test_gradcheck(method, dropout_p):
    def op(*tensors):
        torch.manual_seed(3)
        return deform_sdpa(
            *tensors, grid_size=TINY.grid_size, dropout_p=dropout_p, backend='torch'
        )

    torch.autograd.gradcheck(op, off_the_grid(TINY.inputs()))


def test_pixel_centres_and_borders(method):
    """Sizes of a power of two plus one: coordinates of the centres are exact."""
    case = dataclasses.replace(CASE, grid_size=(5, 9), queries=5, views=1, points=9)
    inputs = case.inputs()
    rows, cols = torch.meshgrid(
        torch.linspace(0, 1, 5), torch.linspace(0, 1, 9), indexing='ij'
    )
    with torch.no_grad():
        inputs[3].copy_(torch.stack((cols, rows), -1)[:, None])
    actual, expected = (
        run(case, 'torch', inputs=inputs),
        run(case, 'naive', inputs=inputs),
    )
    assert_all_close(actual, expected)
    q, k, v = (x.detach() for x in inputs[:3])
    k, v = (x[:, 0].repeat_interleave(2, 1).unflatten(2, (5, 9)) for x in (k, v))
    logits = torch.einsum('bwhnd,bhnpd->bwhnp', q, k) * 8**-0.5
    rows_attended = torch.einsum('bwhnp,bhnpd->bwhnd', logits.softmax(-1), v)
    assert_close(actual[0], rows_attended)


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_points_outside_count_with_logit_zero(backend):
    q, k, v, coords = (x.detach() for x in CASE.inputs())
    outside = deform_sdpa(
        q, k, v, coords * 0 + 3, grid_size=CASE.grid_size, backend=backend
    )
    assert not outside.any()
    half = coords.clone()
    half[..., 1:, :, :] = 3  # all points of the second view
    mixed = deform_sdpa(q, k, v, half, grid_size=CASE.grid_size, backend=backend)
    k[:, 1:], v[:, 1:] = 0, 0
    zeros = deform_sdpa(q, k, v, coords, grid_size=CASE.grid_size, backend=backend)
    assert_close(mixed, zeros)


@pytest.mark.parametrize('value', [float('inf'), -float('inf'), float('nan'), 1e30])
def test_coordinates_that_are_no_place(method, value):
    """They read zeros, and gradients stay finite."""
    inputs = CASE.inputs()
    with torch.no_grad():
        inputs[3][..., 1, 0] = value
    outside = CASE.inputs()
    with torch.no_grad():
        outside[3][..., 1, 0] = 5
    actual = run(CASE, 'torch', inputs=inputs)
    assert_all_close(actual, run(CASE, 'torch', inputs=outside))


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_grouped_heads_equal_repeated_kv(backend):
    q, k, v, coords = CASE.inputs()
    grouped = run(CASE, backend, inputs=[q, k, v, coords])
    k_all, v_all = (x.repeat_interleave(2, dim=2) for x in (k, v))
    repeated = run(CASE, backend, inputs=[q, k_all, v_all, coords])
    assert_close(grouped[0], repeated[0])
    assert_close(grouped[2], repeated[2].unflatten(2, (2, 2)).sum(3))
    assert_close(grouped[3], repeated[3].unflatten(2, (2, 2)).sum(3))
    assert_close(grouped[4], repeated[4])


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_shared_coords_equal_one_group(backend):
    case = dataclasses.replace(CASE, groups=None)
    q, k, v, coords = case.inputs()
    shared = run(case, backend, inputs=[q, k, v, coords])
    grouped = run(case, backend, inputs=[q, k, v, coords.unsqueeze(2)])
    assert shared[-1].shape == coords.shape
    assert_all_close(shared[:-1], grouped[:-1])


def test_x_is_scaled_by_the_width(method):
    """A map of one row: y must not matter, x reaches from the first pixel to the last.

    A published formulation scales x by the height, which square maps hide.
    """
    k = v = torch.arange(6.0).view(1, 1, 1, 6, 1)
    q = torch.zeros(1, 1, 1, 3, 1)
    coords = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1.0, 1.0]]).view(1, 1, 3, 1, 1, 2)
    out = deform_sdpa(q, k, v, coords, grid_size=(1, 6), backend='torch')
    assert_close(out.flatten(), torch.tensor([0.0, 2.5, 5.0]))


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_dropout(backend):
    inputs = [x.detach().float() for x in CASE.inputs()]
    options = dict(grid_size=CASE.grid_size, backend=backend)
    torch.manual_seed(0)
    expected = deform_sdpa(*inputs, **options)
    draws = [deform_sdpa(*inputs, dropout_p=0.3, **options) for _ in range(300)]
    assert_close(sum(draws) / 300, expected, rtol=0, atol=0.35)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(deform_sdpa(*inputs, dropout_p=0.3, **options))
    assert torch.equal(*results)


def test_every_output_is_written(poisoned_memory, method):
    assert all(x.isfinite().all() for x in run(CASE, 'torch'))


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_empty_batch(backend):
    inputs = [x.detach()[:0].requires_grad_() for x in CASE.inputs()]
    out, *grads = run(CASE, backend, inputs=inputs)
    assert out.shape == inputs[0].shape
    assert [g.shape for g in grads] == [x.shape for x in inputs]


def test_no_queries(method):
    q, k, v, coords = CASE.inputs()
    q = q.detach()[:, :, :, :0].requires_grad_()
    coords = coords.detach()[:, :, :, :0].requires_grad_()
    out, *grads = run(CASE, 'torch', inputs=[q, k, v, coords])
    assert out.shape == q.shape
    assert not grads[1].any()
    assert not grads[2].any()
