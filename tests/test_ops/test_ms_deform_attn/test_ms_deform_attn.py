"""ms_deform_attn: torch against naive, and both against mmcv's CPU implementation."""

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from ms_deform_cases import MsDeformCase, drawn_cases, with_gradients
from torch.testing import assert_close

from deform_gqa.ops import ms_deform_attn
from deform_gqa.ops.ms_deform_attn import tiled

GOLDEN = Path(__file__).parents[2] / 'data' / 'golden' / 'ms_deform_attn.npz'


def assert_all_close(actual, expected, tolerance=1e-10):
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        scale = max(1.0, y.abs().max().item()) if y.numel() else 1.0
        assert_close(x, y, rtol=tolerance, atol=tolerance * scale)


def mmcv_outputs(case, inputs):
    """As ``case.run``, by mmcv; it knows neither empty levels nor grouped heads."""
    attention = pytest.importorskip('mmcv.ops.multi_scale_deform_attn')
    value, locations, weights = inputs
    if case.logits:
        weights = weights.flatten(3).softmax(-1).view(weights.shape)
    present = [i for i, shape in enumerate(case.shapes) if 0 not in shape]
    value = value.repeat_interleave(case.heads // case.value_heads, 2)
    if not present:
        out = value.new_zeros(case.batch, case.queries, case.heads * case.dim)
        return with_gradients(out + 0 * sum(x.sum() for x in inputs), inputs)
    out = attention.multi_scale_deformable_attn_pytorch(
        value,
        torch.tensor(case.shapes)[present],
        locations[:, :, :, present],
        weights[:, :, :, present],
    )
    return with_gradients(out, inputs)


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(case=drawn_cases())
def test_equals_naive(case):
    inputs = case.inputs()
    with mock.patch.object(tiled, 'SAMPLES', 90):
        actual = case.run(inputs, 'torch')
    assert_all_close(actual, case.run(inputs, 'naive'))


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(case=drawn_cases(dims=(4, 32)))
@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_equals_mmcv_in_float32(backend, case):
    inputs = dataclasses.replace(case, shift=0.0).inputs(torch.float32)
    assert_all_close(case.run(inputs, backend), mmcv_outputs(case, inputs), 1e-5)


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_equals_golden_data(backend):
    """Made with mmcv; its note says how."""
    data = dict(np.load(GOLDEN))
    assert 'mmcv' in str(data.pop('note'))
    data = {name: torch.from_numpy(x) for name, x in data.items()}
    inputs = [data[name].requires_grad_() for name in ('value', 'locations', 'weights')]
    out = ms_deform_attn(
        inputs[0], data['shapes'], data['starts'], *inputs[1:], backend=backend
    )
    actual = [out, *torch.autograd.grad(out, inputs, data['grad_out'])]
    names = ('out', 'grad_value', 'grad_locations', 'grad_weights')
    assert_all_close(actual, [data[name] for name in names], 1e-5)
    assert out.is_contiguous()


@pytest.mark.parametrize('logits', [False, True])
@pytest.mark.parametrize('value_heads', [4, 2, 1])
def test_gradcheck(value_heads, logits):
    case = MsDeformCase(value_heads=value_heads, logits=logits, queries=3, batch=1)

    def run(value, locations, weights):
        return ms_deform_attn(
            value, case.shapes, None, locations, weights, logits=logits, backend='torch'
        )

    assert torch.autograd.gradcheck(run, case.inputs())


def test_grouped_heads_are_repeated_heads():
    case = MsDeformCase(value_heads=2)
    value, locations, weights = (x.detach() for x in case.inputs())
    options = dict(spatial_shapes=case.shapes, level_start_index=None)
    tensors = dict(sampling_locations=locations, attention_weights=weights)
    out = ms_deform_attn(value, **options, **tensors)
    repeated = ms_deform_attn(value.repeat_interleave(2, 2), **options, **tensors)
    assert_close(out, repeated)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_low_precision(dtype, backend):
    case = MsDeformCase(logits=True)
    inputs = case.inputs(dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = case.run(exact_inputs, 'naive')
    for x, y in zip(case.run(inputs, backend), exact, strict=True):
        error = (x.double() - y).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * y.abs().max()


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_weights_in_float32_beside_half_values(backend):
    value, locations, weights = MsDeformCase().inputs(torch.bfloat16)
    weights = weights.detach().float().requires_grad_()
    out, *grads = MsDeformCase().run([value, locations, weights], backend)
    assert out.dtype == torch.bfloat16
    assert [x.dtype for x in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize('backend', ['naive', 'torch'])
@pytest.mark.parametrize(
    'empty', [dict(batch=0), dict(queries=0), dict(shapes=((0, 3),))]
)
def test_empty(backend, empty):
    case = MsDeformCase(**empty)
    inputs = case.inputs()
    out, *grads = case.run(inputs, backend)
    assert out.shape == (case.batch, case.queries, 24) and not out.any()
    for grad, x in zip(grads, inputs, strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize('backend', ['naive', 'torch'])
def test_locations_that_are_not_finite_count_as_outside(backend):
    """Those that are so large that pixels cannot be counted as well."""
    case = MsDeformCase()
    value, locations, weights = case.inputs(torch.float32)
    far = locations.detach().clone()
    far[:, :, :, 0, 0, 1] = -9.0
    expected = case.run([value, far.requires_grad_(), weights], backend)
    for x in (float('nan'), float('inf'), -float('inf'), 1e38, -3e38):
        bad = locations.detach().clone()
        bad[:, :, :, 0, 0, 1] = x
        actual = case.run([value, bad.requires_grad_(), weights], backend)
        assert_all_close(actual, expected, 1e-6)


def test_uninitialised_memory_is_overwritten(poisoned_memory):
    case = MsDeformCase()
    inputs = case.inputs()
    assert_all_close(case.run(inputs, 'torch'), case.run(inputs, 'naive'))


def test_deterministic_mode_gives_the_same_bits():
    case = MsDeformCase(queries=200, places='pixels', shapes=((3, 3),))
    inputs = case.inputs(torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (case.run(inputs, 'torch') for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_products_gathered_as_on_a_gpu():
    rows, x = torch.randn(9, 4), torch.randn(5, 4)
    index = torch.randint(9, (5, 6), dtype=torch.int32)
    expected = (rows[index.long()] * x[:, None]).sum(-1)
    for products in (tiled.gathered_products, tiled.sparse_products):
        assert_close(products(rows, index, x), expected)
