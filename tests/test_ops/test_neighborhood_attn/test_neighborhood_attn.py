"""neighborhood_attn: the torch backend against naive."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_cases import assert_all_close, make_inputs, outputs_and_gradients

from deform_gqa.ops import neighborhood_attn
from deform_gqa.ops.neighborhood_attn import tiled_map as neighborhood_map
from deform_gqa.ops.neighborhood_attn.tiled_halos import cut_axis

LOW_PRECISION_ATOL = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}


@st.composite
def cases(draw):
    kernel_size = draw(st.sampled_from([3, 5, 7, 9]))
    dilation = draw(st.integers(1, 3))
    side = st.integers(0, 14).map(lambda more: kernel_size * dilation + more)
    kv_heads = draw(st.integers(1, 3))
    return dict(
        grid_size=(draw(side), draw(side)),
        kernel_size=kernel_size,
        dilation=dilation,
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([1, 5, 8, 12])),
        batch=draw(st.integers(1, 3)),
        rpb=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.7])),
        chunk_elements=draw(st.sampled_from([1, 20_000, 2**19])),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases())
def test_matches_naive(case):
    chunk_elements = case.pop('chunk_elements')
    options = {k: case.pop(k) for k in ('dilation', 'scale')}
    inputs = make_inputs(**case)
    options |= {k: case[k] for k in ('grid_size', 'kernel_size')}
    expected = outputs_and_gradients(inputs, **options, backend='naive')
    with mock.patch.object(neighborhood_map, 'CHUNK_ELEMENTS', chunk_elements):
        actual = outputs_and_gradients(inputs, **options, backend='torch')
    assert_all_close(actual, expected)


@pytest.mark.parametrize(
    ('grid_size', 'kernel_size', 'dilation'),
    [
        ((7, 7), 7, 1),  # one window is the whole map
        ((9, 12), 3, 3),  # H is kernel_size * dilation
        ((10, 8), 7, 1),
        ((9, 73), 7, 1),  # the last tile is nearly all padding
        ((57, 25), 15, 1),  # windows larger than a tile
        ((21, 22), 7, 3),  # phases of different lengths
        ((40, 6), 5, 1),
    ],
)
def test_border_cases(grid_size, kernel_size, dilation):
    inputs = make_inputs(grid_size, kernel_size, dim=5)
    options = dict(grid_size=grid_size, kernel_size=kernel_size, dilation=dilation)
    expected = outputs_and_gradients(inputs, **options, backend='naive')
    actual = outputs_and_gradients(inputs, **options)
    assert_all_close(actual, expected)


@pytest.mark.parametrize('kernel_size', [3, 7, 9, 13, 21])
@pytest.mark.parametrize('max_tile', [4, 8])
def test_every_query_of_an_axis_sees_its_window_once(kernel_size, max_tile):
    for size in range(kernel_size, 80):
        axis = cut_axis(size, kernel_size, max_tile)
        patterns = axis.patterns[axis.pattern_ids]  # (tiles, halo, tile)
        assert ((patterns >= 0).sum(1) == kernel_size).all()
        keys, tile_ids = torch.arange(axis.halo), torch.arange(axis.num_tiles)
        keys = keys + tile_ids[:, None] * axis.tile - axis.key_pad
        inside = (keys >= 0) & (keys < size)
        assert (inside[:, :, None] | (patterns < 0)).all()


def test_non_contiguous_inputs():
    grid_size = (9, 11)
    options = dict(grid_size=grid_size, kernel_size=5)
    qkv = torch.randn(2, 99, 3, 4, 6, dtype=torch.float64).permute(2, 0, 3, 1, 4)
    rpb = torch.randn(9, 9, 4, dtype=torch.float64).permute(2, 0, 1)
    inputs = [x.detach().requires_grad_() for x in (*qkv, rpb)]
    expected = outputs_and_gradients(inputs, **options, backend='naive')
    actual = outputs_and_gradients(inputs, **options)
    assert_all_close(actual, expected)
    out = neighborhood_attn(*inputs, **options)
    grad_out = torch.randn(2, 4, 6, 99, dtype=torch.float64).transpose(2, 3)
    assert_all_close(
        torch.autograd.grad(out, inputs, grad_out),
        torch.autograd.grad(
            neighborhood_attn(*inputs, **options), inputs, grad_out.contiguous()
        ),
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('rpb_dtype', [None, torch.float32])
def test_error_is_at_most_twice_that_of_naive(dtype, rpb_dtype):
    options = dict(grid_size=(13, 18), kernel_size=7)
    inputs = make_inputs(options['grid_size'], 7, heads=4, kv_heads=2, dim=16)
    low = [x.detach().to(dtype).requires_grad_() for x in inputs]
    if rpb_dtype is not None:
        low[3] = low[3].detach().to(rpb_dtype).requires_grad_()
    exact_inputs = [x.detach().double().requires_grad_() for x in low]
    exact = outputs_and_gradients(exact_inputs, **options, backend='naive')
    naive = outputs_and_gradients(low, **options, backend='naive')
    ours = outputs_and_gradients(low, **options)
    for x, y, truth in zip(ours, naive, exact, strict=True):
        assert x.dtype == y.dtype
        error, naive_error = ((z.double() - truth).abs().max() for z in (x, y))
        scale = truth.abs().max().clamp(min=1)
        assert error <= 2 * naive_error + LOW_PRECISION_ATOL[dtype] * scale


def test_large_logits_stay_finite():
    inputs = make_inputs((8, 9), 3)
    with torch.no_grad():
        inputs[0].mul_(1e3)
        inputs[3].mul_(1e3)
    options = dict(grid_size=(8, 9), kernel_size=3)
    expected = outputs_and_gradients(inputs, **options, backend='naive')
    assert_all_close(outputs_and_gradients(inputs, **options), expected, 1e-8)


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_empty_batch(backend):
    inputs = make_inputs((8, 9), 3, batch=0)
    options = dict(grid_size=(8, 9), kernel_size=3, backend=backend)
    out, *grads = outputs_and_gradients(inputs, **options)
    assert out.shape == (0, 4, 72, 8)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert not grads[3].any()


@pytest.mark.parametrize('dilation', [1, 2])
def test_every_element_is_written(poisoned_memory, dilation):
    inputs = make_inputs((17, 21), 5)
    options = dict(grid_size=(17, 21), kernel_size=5, dilation=dilation)
    for x in outputs_and_gradients(inputs, **options):
        assert x.isfinite().all()


@pytest.mark.parametrize('rpb', [True, False])
@pytest.mark.parametrize('dropout_p', [0.0, 0.4])
def test_gradcheck(rpb, dropout_p):
    inputs = make_inputs((6, 9), 3, batch=1, heads=2, kv_heads=1, dim=2, rpb=rpb)

    def run(*tensors):
        torch.manual_seed(3)  # the same dropout at each call
        return neighborhood_attn(
            *tensors, grid_size=(6, 9), kernel_size=3, dilation=2, dropout_p=dropout_p
        )

    # Several chunks, each with a seed of its own.
    with mock.patch.object(neighborhood_map, 'CHUNK_ELEMENTS', 1):
        assert torch.autograd.gradcheck(run, inputs)


class TestDropout:
    def test_follows_the_seed_of_torch(self):
        inputs = make_inputs((9, 10), 3)
        options = dict(grid_size=(9, 10), kernel_size=3, dropout_p=0.3)
        outs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(neighborhood_attn(*inputs, **options))
        assert torch.equal(outs[0], outs[1])
        assert not torch.allclose(outs[0], outs[2])

    def test_chunks_and_sub_maps_differ(self):
        """Equal keys and values everywhere: only the dropout makes outputs differ."""
        q = torch.ones(1, 1, 12 * 12, 2)
        with mock.patch.object(neighborhood_map, 'CHUNK_ELEMENTS', 1):
            out = neighborhood_attn(
                q, q, q, grid_size=(12, 12), kernel_size=3, dilation=2, dropout_p=0.5
            )
        maps = out.unflatten(2, (12, 12))[0, 0, ..., 0]
        phases = [maps[i::2, j::2] for i in (0, 1) for j in (0, 1)]
        for i in range(4):
            for j in range(i):
                assert not torch.equal(phases[i], phases[j])

    def test_expectation_is_the_output_without_dropout(self):
        repeats = 4000
        inputs = make_inputs((5, 6), 3, batch=1, dim=4)
        q, k, v = (x.detach().expand(repeats, -1, -1, -1) for x in inputs[:3])
        options = dict(grid_size=(5, 6), kernel_size=3)
        expected = neighborhood_attn(*inputs, **options).detach()[0]
        torch.manual_seed(0)
        outs = neighborhood_attn(q, k, v, inputs[3].detach(), **options, dropout_p=0.3)
        bound = 5 * outs.std(0) / repeats**0.5  # five standard errors
        assert ((outs.mean(0) - expected).abs() <= bound + 1e-6).all()


def test_backward_is_deterministic():
    inputs = make_inputs((23, 30), 7)
    options = dict(grid_size=(23, 30), kernel_size=7)
    first, second = (outputs_and_gradients(inputs, **options) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
