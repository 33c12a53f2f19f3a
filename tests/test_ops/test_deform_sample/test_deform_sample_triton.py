"""deform_sample's Triton kernels on the CPU, by the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

pytest.importorskip('triton')

from triton_cases import assert_as_good_as, poisoned_memory, to_double

from deform_gqa.ops import deform_sample
from deform_gqa.ops.deform_sample.api import deform_sample_op

pytestmark = pytest.mark.interpret

ATOL = {torch.float32: 1e-5, torch.float16: 1e-3}


def make(shape, groups, keys, dtype=torch.float32, layout='contiguous', seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == 'transposed':
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    pos = torch.rand(shape[0], groups, keys, 2, generator=generator) * 2.8 - 1.4
    return x.requires_grad_(), pos.requires_grad_()


def run(x, pos, backend):
    out = deform_sample(x, pos, backend=backend)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out, *torch.autograd.grad(out, (x, pos), grad)]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 16, 70]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    keys=st.integers(1, 50),
    layout=st.sampled_from(['contiguous', 'channels_last', 'transposed']),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize('dtype', list(ATOL))
def test_equals_naive(dtype, batch, groups, channels, size, keys, layout, seed):
    shape = (batch, groups * channels, *size)
    inputs = make(shape, groups, keys, dtype, layout, seed)
    with poisoned_memory():
        actual = run(*inputs, 'triton')
    exact = run(*to_double(inputs), 'naive')
    assert_as_good_as(actual, run(*inputs, 'naive'), exact, ATOL[dtype])


def test_deterministic_mode():
    inputs = make((2, 6, 5, 7), 3, 40)
    expected = run(*inputs, 'triton')
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(*inputs, 'triton') for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, e in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert_close(a, e)


def test_output_may_be_changed_in_place():
    inputs = make((1, 4, 5, 7), 2, 6)
    out = deform_sample(*inputs, backend='triton')
    out += 1
    grads = torch.autograd.grad(out.sum(), inputs)
    expected = torch.autograd.grad(
        deform_sample(*inputs, backend='naive').sum(), inputs
    )
    assert_close(grads, expected)


def test_empty_batch():
    inputs = make((0, 6, 5, 7), 3, 4)
    out, grad_x, grad_pos = run(*inputs, 'triton')
    assert out.shape == (0, 6, 4)
    assert grad_x.shape == inputs[0].shape and grad_pos.shape == inputs[1].shape


def test_non_finite_positions_stay_in_bounds():
    x, pos = make((1, 2, 3, 4), 1, 3)
    with torch.no_grad():
        pos[0, 0] = torch.tensor([[1e30, 0], [float('inf'), 0], [0, float('nan')]])
    assert_close(run(x, pos, 'triton')[0][:, :, :2], torch.zeros(1, 2, 2))


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'transposed'])
def test_opcheck(layout):
    torch.library.opcheck(deform_sample_op, make((2, 4, 5, 7), 2, 6, layout=layout))
