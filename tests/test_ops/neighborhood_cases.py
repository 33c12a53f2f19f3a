"""Inputs and comparisons shared by the tests of neighborhood_attn."""

import torch

from deform_gqa.ops import neighborhood_attn


def make_inputs(
    grid_size, kernel_size, *, batch=2, heads=4, kv_heads=2, dim=8, rpb=True, seed=0
):
    """Random float64 q, k, v and rpb (or None) that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    places = grid_size[0] * grid_size[1]
    shapes = [
        (batch, heads, places, dim),
        (batch, kv_heads, places, dim),
        (batch, kv_heads, places, dim),
        (heads, 2 * kernel_size - 1, 2 * kernel_size - 1),
    ]
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    return inputs if rpb else [*inputs[:3], None]


def outputs_and_gradients(inputs, **options):
    """[out, gradients of all inputs that are there] for a fixed upstream gradient."""
    out = neighborhood_attn(*inputs, **options)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    present = [x for x in inputs if x is not None]
    return [out, *torch.autograd.grad(out, present, grad_out.to(out.dtype))]


def assert_all_close(actual, expected, tolerance=1e-10):
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
