"""Whole calls, forward and backward, captured in a CUDA graph and replayed."""

import pytest
import torch

pytest.importorskip('triton')

from deform_gqa.ops import deform_attn, deform_sample, deform_sdpa, neighborhood_attn

pytestmark = pytest.mark.cuda

GRID_SIZE, QUERIES, KEYS = (9, 14), 126, 35


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device='cuda', dtype=torch.float16).requires_grad_()


def positions() -> torch.Tensor:
    return (torch.rand(2, 2, KEYS, 2, device='cuda') * 2 - 1).requires_grad_()


def attn_inputs():
    return draw(2, 4, QUERIES, 32), draw(2, 2, KEYS, 32), draw(2, 2, KEYS, 32)


def deform_attn_call():
    table = torch.randn(4, 7, 9, device='cuda').requires_grad_()
    inputs = *attn_inputs(), positions(), table
    return inputs, lambda: deform_attn(*inputs, grid_size=GRID_SIZE, backend='triton')


def deform_attn_call_without_bias():
    inputs = attn_inputs()
    return inputs, lambda: deform_attn(*inputs, grid_size=GRID_SIZE, backend='triton')


def deform_sample_call():
    inputs = draw(2, 64, *GRID_SIZE), positions()
    return inputs, lambda: deform_sample(*inputs, backend='triton')


def deform_sdpa_call():
    coords = torch.rand(2, 1, QUERIES, 3, 4, 2, device='cuda').requires_grad_()
    maps = (draw(2, 3, 2, QUERIES, 32) for _ in range(2))
    inputs = draw(2, 1, 4, QUERIES, 32), *maps, coords
    return inputs, lambda: deform_sdpa(*inputs, grid_size=GRID_SIZE, backend='triton')


def neighborhood_attn_call():
    rpb = torch.randn(4, 5, 5, device='cuda').requires_grad_()
    inputs = draw(2, 4, QUERIES, 32), *(draw(2, 2, QUERIES, 32) for _ in 'kv'), rpb
    options = dict(grid_size=GRID_SIZE, kernel_size=3, backend='triton')
    return inputs, lambda: neighborhood_attn(*inputs, **options)


@pytest.mark.parametrize(
    'make',
    [
        deform_attn_call,
        deform_attn_call_without_bias,
        deform_sample_call,
        deform_sdpa_call,
        neighborhood_attn_call,
    ],
)
def test_replay_equals_a_call(make):
    torch.manual_seed(0)
    inputs, call = make()
    grad = torch.randn_like(call())

    def step():
        out = call()
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills what is kept from call to call
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(x.flip(0))
    expected = step()
    graph.replay()
    torch.cuda.synchronize()
    for actual, wanted in zip(captured, expected, strict=True):
        # Atomics add up in any order.
        torch.testing.assert_close(actual, wanted, rtol=1e-2, atol=1e-2)
