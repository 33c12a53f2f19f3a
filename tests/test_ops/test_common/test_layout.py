"""out and the gradient of q lie in memory as tokens: merging their heads is free."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deform_gqa.ops import deform_attn, neighborhood_attn
from deform_gqa.ops.common.layout import empty_tokens_like

GRID_SIZE = (6, 7)


def merges_as_view(x):
    return x.transpose(1, 2).flatten(2).data_ptr() == x.data_ptr()


def deform(q, k, v):
    pos = torch.rand(2, 1, k.shape[2], 2) * 2 - 1
    table = torch.randn(4, 5, 6)
    return deform_attn(q, k, v, pos, table, grid_size=GRID_SIZE, backend='torch')


def neighborhood(q, k, v):
    options = dict(grid_size=GRID_SIZE, kernel_size=3, dilation=2)
    return neighborhood_attn(q, k, v, **options, backend='torch')


def test_empty_tokens_like():
    x = torch.zeros(2, 4, 6, 8, dtype=torch.float16)
    tokens = empty_tokens_like(x)
    assert tokens.shape == x.shape and tokens.dtype == x.dtype
    assert merges_as_view(tokens) and not merges_as_view(x)


@pytest.mark.parametrize('attention', [deform, neighborhood])
def test_output_and_gradient_of_q(attention):
    """Whatever the layout of the inputs and of the gradient of the output."""
    q, k, v = torch.randn(3, 2, 4, 42, 8)
    for q_of_layout in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        q_of_layout = q_of_layout.requires_grad_()
        out = attention(q_of_layout, k[:, ::2], v[:, ::2])
        assert merges_as_view(out)
        (grad,) = torch.autograd.grad(out, q_of_layout, torch.randn(out.shape))
        assert merges_as_view(grad)


def test_traced_gradients_lie_in_memory_as_real_ones():
    """Whatever the layout of the inputs."""
    grad_out, out, q, k, v = torch.randn(5, 2, 42, 4, 8).transpose(2, 3)
    tensors = [grad_out, out, torch.randn(2, 4, 42), q, k, v]
    backward = torch.ops.deform_gqa.neighborhood_attn_backward
    options = (None, None, *GRID_SIZE, 0.3, 0.0, 3, 1, 'torch')
    real = backward(*tensors, *options)
    with FakeTensorMode() as mode:
        traced = backward(*map(mode.from_tensor, tensors), *options)
    assert [x.stride() for x in traced] == [x.stride() for x in real]
