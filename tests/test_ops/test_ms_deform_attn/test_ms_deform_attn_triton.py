"""ms_deform_attn's Triton kernels on the CPU, by the interpreter."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

pytest.importorskip('triton')

from ms_deform_cases import MsDeformCase, drawn_cases
from triton_cases import assert_as_good_as, poisoned_memory, to_double

from deform_gqa.ops import ms_deform_attn
from deform_gqa.ops.ms_deform_attn.api import ms_deform_attn_op

pytestmark = pytest.mark.interpret

ATOL = {torch.float32: 1e-5, torch.float16: 1e-3}
# As for other ops with a softmax: backward takes a sum from the rounded output
ATOL_LOGITS = {torch.float32: 1e-5, torch.float16: 3e-3}


def check(case, dtype):
    inputs = case.inputs(dtype)
    with poisoned_memory():
        actual = case.run(inputs, 'triton')
    exact = case.run(to_double(inputs), 'naive')
    tensors = zip(actual, case.run(inputs, 'naive'), exact, strict=True)
    # Where all levels are empty, so is value
    present = [x for x in tensors if x[2].numel() or x[0].shape != x[2].shape]
    atol = (ATOL_LOGITS if case.logits else ATOL)[dtype]
    assert_as_good_as(*zip(*present, strict=True), atol)


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(
    case=drawn_cases(max_queries=9, dims=(8, 12, 32), max_product=4),
    dtype=st.sampled_from(list(ATOL)),
)
def test_equals_naive(case, dtype):
    """Few samples each, as the interpreter takes tens of milliseconds for one."""
    check(case, dtype)


@pytest.mark.parametrize(('dim', 'queries'), [(32, 33), (200, 5)])
@pytest.mark.parametrize('logits', [False, True])
@pytest.mark.parametrize('dtype', list(ATOL))
def test_several_tiles(dtype, logits, dim, queries):
    case = MsDeformCase(
        batch=1, queries=queries, heads=2, value_heads=1, points=2, dim=dim
    )
    check(dataclasses.replace(case, logits=logits), dtype)


@pytest.mark.parametrize('logits', [False, True])
def test_deterministic_mode(logits):
    case = MsDeformCase(
        batch=1, queries=40, heads=2, value_heads=1, logits=logits, dim=8
    )
    inputs = case.inputs(torch.float32)
    expected = case.run(inputs, 'triton')
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (case.run(inputs, 'triton') for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, e in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('logit', [float('nan'), float('inf')])
def test_bad_logits_reach_value_in_deterministic_mode(logit):
    """An integer sum would hold an ordinary number in place of nan."""
    case = MsDeformCase(
        batch=1, queries=2, heads=1, value_heads=1, points=1, logits=True, dim=8
    )
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        inputs[2][0, 0, 0, 0] = logit
    torch.use_deterministic_algorithms(True)
    try:
        _, grad_value, *_ = case.run(inputs, 'triton')
    finally:
        torch.use_deterministic_algorithms(False)
    assert grad_value.isnan().any()


def test_fixed_point_sums_do_not_overflow():
    """All samples of the heads that share a value hit one pixel, with equal signs."""
    from deform_gqa.ops.ms_deform_attn import triton_launch

    case = MsDeformCase(
        batch=1, queries=12, heads=2, value_heads=1, points=2, dim=8, shapes=((1, 1),)
    )
    value, locations, weights = case.inputs(torch.float32)
    with torch.no_grad():
        locations.fill_(0.5), weights.fill_(5.0)
    grad_out = torch.full((1, 12, 16), 3.0)
    for logits, each in ((False, 5.0), (True, 0.5)):
        unit = triton_launch._unit(grad_out, weights, value, logits)
        total = 12 * 2 * 2 * each * 3.0
        assert 2**59 < total * unit <= 2**61


@pytest.mark.parametrize(
    'empty', [dict(batch=0), dict(queries=0), dict(shapes=((0, 3),))]
)
def test_empty(empty):
    case = MsDeformCase(**empty, dim=8)
    inputs = case.inputs(torch.float32)
    out, *grads = case.run(inputs, 'triton')
    assert out.shape == (case.batch, case.queries, 32) and not out.any()
    for grad, x in zip(grads, inputs, strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_locations_that_are_no_numbers_count_as_outside():
    case = MsDeformCase(dim=8)
    value, locations, weights = (x.detach() for x in case.inputs(torch.float32))
    for x in (float('nan'), float('inf'), float('-inf'), 1e30):
        bad, far = locations.clone(), locations.clone()
        bad[:, :, :, 0, 0, 1], far[:, :, :, 0, 0, 1] = x, -9.0
        outs = [
            ms_deform_attn(value, case.shapes, None, y, weights, backend='triton')
            for y in (bad, far)
        ]
        assert_close(*outs)


@pytest.mark.parametrize('logits', [False, True])
def test_opcheck(logits):
    case = MsDeformCase(dim=8, queries=3)
    value, locations, weights = case.inputs(torch.float32)
    levels = torch.tensor(case.shapes), torch.tensor([0, 35])
    torch.library.opcheck(
        ms_deform_attn_op, (value, *levels, locations, weights, logits, 'triton')
    )
