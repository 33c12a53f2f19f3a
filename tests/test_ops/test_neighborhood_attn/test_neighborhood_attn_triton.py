"""The Triton kernels of neighborhood_attn on the CPU, by the interpreter."""

import dataclasses

import pytest
import torch
from drawn_neighborhood_cases import neighborhood_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_cases import NeighborhoodCase, outputs_and_gradients
from torch.testing import assert_close

pytest.importorskip('triton')

from triton_cases import assert_as_good_as, poisoned_memory, tile_sizes, to_double

from deform_gqa.ops import neighborhood_attn
from deform_gqa.ops.common.block_sizes import BlockSizes
from deform_gqa.ops.common.heads import repeat_kv
from deform_gqa.ops.neighborhood_attn import naive, triton_launch
from deform_gqa.ops.neighborhood_attn.api import neighborhood_attn_op
from deform_gqa.ops.neighborhood_attn.triton_launch import (
    neighborhood_attn_backward,
    neighborhood_attn_forward,
)

pytestmark = pytest.mark.interpret

CASE = NeighborhoodCase(
    batch=1,
    heads=2,
    kv_heads=1,
    grid_size=(9, 12),
    kernel_size=5,
    dilation=1,
    head_dim=16,
    rpb=True,
    strided=False,
    seed=0,
)
# The interpreter takes as long for a large tile as for a small one.
SIZES = [
    BlockSizes(queries=128, keys=128, warps=8, stages=1),
    BlockSizes(queries=64, keys=128, warps=4, stages=1),
    BlockSizes(queries=128, keys=64, warps=4, stages=1),
    BlockSizes(queries=64, keys=32, warps=4, stages=1),
]
ATOL = {torch.float32: 5e-5, torch.float16: 3e-3}


def run(case, backend, inputs, **options):
    return outputs_and_gradients(inputs, **case.options(), **options, backend=backend)


def check(case, dtype, **options):
    inputs = case.inputs(dtype)
    with poisoned_memory():
        actual = run(case, 'triton', inputs, **options)
    expected = run(case, 'naive', inputs, **options)
    exact = run(case, 'naive', to_double(inputs), **options)
    assert_as_good_as(actual, expected, exact, ATOL[dtype])


# Two of each so that both workers of pytest-xdist have something to do.
@pytest.mark.parametrize('half', [0, 1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_equals_naive(dtype, half):
    @settings(max_examples=38, deadline=None, derandomize=True, database=None)
    @given(neighborhood_cases(), st.sampled_from(SIZES))
    def check_drawn(case, sizes):
        with tile_sizes(sizes):
            check(dataclasses.replace(case, seed=2 * case.seed + half), dtype)

    check_drawn()


@pytest.mark.parametrize(
    ('grid_size', 'kernel_size', 'dilation'),
    [
        ((7, 7), 7, 1),  # one window is the whole map
        ((6, 7), 3, 2),  # phases of different lengths
        ((3, 33), 3, 1),
        ((33, 3), 3, 1),
        ((25, 26), 7, 1),  # inner patches
        ((8, 22), 7, 1),  # queries of the last patch of keys reach 17 columns
        ((15, 15), 15, 1),  # walked tiles of 32 columns
        ((9, 17), 9, 1),  # keys of the second patch are seen from the first column
        ((10, 13), 5, 2),  # patches beyond the smaller phases
        ((14, 17), 7, 2),
    ],
)
def test_shapes(grid_size, kernel_size, dilation):
    case = dataclasses.replace(CASE, heads=1, grid_size=grid_size, head_dim=8)
    case = dataclasses.replace(case, kernel_size=kernel_size, dilation=dilation)
    check(case, torch.float32)


def test_windows_wider_than_a_tile():
    case = dataclasses.replace(CASE, heads=1, grid_size=(17, 18), kernel_size=17)
    with tile_sizes(BlockSizes(queries=128, keys=16, warps=4, stages=1)):
        check(dataclasses.replace(case, head_dim=8, rpb=False), torch.float32)


@pytest.mark.parametrize('head_dim', [96, 200, 256])
def test_large_head_dims(head_dim):
    case = dataclasses.replace(CASE, heads=1, grid_size=(5, 6), kernel_size=3)
    check(dataclasses.replace(case, head_dim=head_dim), torch.float32)


@pytest.mark.parametrize('scale', [-0.7, 0.0, 1e-4, 3.0])
def test_scales(scale):
    case = dataclasses.replace(CASE, kernel_size=3, grid_size=(6, 7))
    check(case, torch.float32, scale=scale)


@pytest.mark.parametrize('target_programs', [1, 512])
def test_split_heads(monkeypatch, target_programs):
    """The heads of a group, all in one program or each in its own."""
    monkeypatch.setattr(triton_launch, 'TARGET_PROGRAMS', target_programs)
    check(dataclasses.replace(CASE, heads=6, kv_heads=2), torch.float32)


def test_large_logits_stay_finite():
    """Keys that the window does not hold stay out, however large their logits are."""
    inputs = CASE.inputs(torch.float32)
    with torch.no_grad():
        inputs[0].mul_(1e3)
        inputs[3].mul_(1e3)
    actual = run(CASE, 'triton', inputs)
    assert all(x.isfinite().all() for x in actual)
    exact, expected = (run(CASE, 'naive', x)[:1] for x in (to_double(inputs), inputs))
    assert_as_good_as(actual[:1], expected, exact, ATOL[torch.float32])


def test_gradient_that_is_not_contiguous():
    inputs = CASE.inputs(torch.float32)
    out = neighborhood_attn(*inputs, **CASE.options(), backend='triton')
    grad_out = torch.randn(out.transpose(2, 3).shape).transpose(2, 3)
    actual = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
    wanted = torch.autograd.grad(out, inputs, grad_out.contiguous())
    for a, w in zip(actual, wanted, strict=True):
        assert torch.equal(a, w)


@pytest.mark.parametrize('head_dim', [16, 200])
def test_any_layout_of_the_saved_output(head_dim):
    case = dataclasses.replace(CASE, grid_size=(4, 5), kernel_size=3, heads=4)
    case = dataclasses.replace(case, head_dim=head_dim)
    inputs = [x.detach() for x in case.inputs(torch.float32)]
    options = dict(seed=0, **case.options(), scale=0.3, dropout_p=0.0)
    out, lse = neighborhood_attn_forward(*inputs, **options)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    grad_out = torch.randn(out.shape)
    wanted = neighborhood_attn_backward(grad_out, out, lse, *inputs, **options)
    assert wanted[0].transpose(1, 2).is_contiguous()
    for copy in (out.contiguous(), out.transpose(2, 3).contiguous().transpose(2, 3)):
        actual = neighborhood_attn_backward(grad_out, copy, lse, *inputs, **options)
        for a, w in zip(actual, wanted, strict=True):
            assert torch.equal(a, w)


@pytest.mark.parametrize('rpb', [True, False])
def test_empty_batch(rpb):
    case = dataclasses.replace(CASE, batch=0, rpb=rpb)
    inputs = case.inputs(torch.float32)
    out, *grads = run(case, 'triton', inputs)
    assert out.shape == inputs[0].shape
    for x, grad in zip([x for x in inputs if x is not None], grads, strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_deterministic_mode():
    """All sums have a fixed order, so that it changes nothing."""
    inputs = CASE.inputs(torch.float32)
    expected = run(CASE, 'triton', inputs)
    torch.use_deterministic_algorithms(True)
    try:
        again = run(CASE, 'triton', inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, e in zip(again, expected, strict=True):
        assert torch.equal(a, e)


def test_dropout_is_the_same_in_forward_and_backward():
    """With unit vectors as values the output is the matrix of attention weights."""
    case = dataclasses.replace(CASE, grid_size=(6, 8), kernel_size=3, head_dim=48)
    case = dataclasses.replace(case, dilation=2)
    inputs = case.inputs(torch.float32)
    v = inputs[2]
    options = dict(**case.options(), scale=0.25)
    kernel = dict(seed=11, dropout_p=0.4, **options)
    with torch.no_grad():
        v.copy_(torch.eye(48).expand_as(v))
    out, lse = neighborhood_attn_forward(*inputs, **kernel)
    weights = naive.neighborhood_attn(*inputs, **options, dropout_p=0.0)
    keep = (out != 0).float() / 0.6
    assert_close(out, weights * keep, rtol=1e-4, atol=1e-5)
    seen = weights > 0
    assert 0.35 < (out == 0)[seen].float().mean() < 0.45

    # The values are the identity only in forward: their gradient is linear anyway.
    values = repeat_kv(v, case.heads)
    dropped = torch.einsum(
        'bhns,bhsd->bhnd', weights_of(inputs, options) * keep, values
    )
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(dropped, inputs, grad_out)
    actual = neighborhood_attn_backward(grad_out, out, lse, *inputs, **kernel)
    for a, w in zip(actual, wanted, strict=True):
        assert_close(a, w, rtol=1e-3, atol=1e-4)

    other, _ = neighborhood_attn_forward(*inputs, **{**kernel, 'seed': 12})
    assert ((other == 0) != (out == 0))[seen].float().mean() > 0.3


def weights_of(inputs, options):
    """(B, Hq, N, N) attention weights, for 48 places."""
    q, k, v, rpb = inputs
    eye = torch.eye(v.shape[2]).expand_as(v)
    return naive.neighborhood_attn(q, k, eye, rpb, **options, dropout_p=0.0)


def test_log_sum_exp():
    """That of equal logits is the logarithm of K * K."""
    q, k, v, rpb = CASE.inputs(torch.float32)
    options = dict(seed=0, **CASE.options(), scale=0.3, dropout_p=0.0)
    _, lse = neighborhood_attn_forward(q * 0, k, v, None, **options)
    assert_close(lse, torch.full_like(lse, 25.0).log())
    _, shifted = neighborhood_attn_forward(q * 0, k, v, rpb * 0 + 2, **options)
    assert_close(shifted, lse + 2)


@pytest.mark.parametrize('rpb', [True, False])
def test_opcheck(rpb):
    case = dataclasses.replace(CASE, grid_size=(4, 5), kernel_size=3, rpb=rpb)
    options = torch.tensor(3), 4, 5, 0.3, 0.1, 3, 1, 'triton'
    torch.library.opcheck(neighborhood_attn_op, (*case.inputs(torch.float32), *options))


def test_double_backward_is_refused():
    case = dataclasses.replace(CASE, grid_size=(4, 5), kernel_size=3)
    inputs = case.inputs(torch.float32)
    out = neighborhood_attn(*inputs, **case.options(), backend='triton')
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated twice'):
        grad.sum().backward()


def test_double_precision_is_refused():
    with pytest.raises(ValueError, match='float64'):
        run(CASE, 'triton', CASE.inputs(torch.float64))
