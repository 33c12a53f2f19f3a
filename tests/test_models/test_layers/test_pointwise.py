"""1 x 1 convolutions, and the layouts in which keys and values reach the op."""

from unittest import mock

import pytest
import torch
from torch.testing import assert_close

from deform_gqa.models.layers import DeformableGQA, deformable_gqa
from deform_gqa.models.layers.pointwise import PointwiseConv


def as_channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('channels_last', [True, False])
def test_equals_a_convolution(batch, channels_last):
    layer = PointwiseConv(6, 4).double()
    x = torch.randn(batch, 6, 5, 7, dtype=torch.float64)
    x = (as_channels_last(x) if channels_last else x).requires_grad_()
    expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
    out = layer(x)
    grad = torch.randn_like(expected)
    inputs = x, layer.weight, layer.bias
    assert_close(out, expected)
    assert_close(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
    )


@pytest.mark.parametrize('batch', [1, 2])
def test_a_map_with_channels_last_stays_one(batch):
    x = as_channels_last(torch.randn(batch, 6, 5, 7))
    with mock.patch.object(torch.nn.Conv2d, 'forward', side_effect=AssertionError):
        out = PointwiseConv(6, 4)(x)
    assert out.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize('backend', ['naive', 'torch'])
@pytest.mark.parametrize('offset_groups', [1, 2])
@pytest.mark.parametrize('batch', [1, 2])
def test_rows_of_keys_and_values_are_dense(backend, offset_groups, batch):
    """Kernels load rows of k and v; so samples and projections have channels last."""
    layer = DeformableGQA(
        16,
        4,
        num_kv_heads=2,
        offset_groups=offset_groups,
        stride=2,
        table_size=(5, 7),
        backend=backend,
    )
    seen = []

    def attend(q, k, v, *args, **options):
        seen.extend([q, k, v])
        return deform_attn(q, k, v, *args, **options)

    deform_attn = deformable_gqa.deform_attn
    x = as_channels_last(torch.randn(batch, 16, 10, 14))
    with mock.patch.object(deformable_gqa, 'deform_attn', attend):
        layer(x)
    q, k, v = seen
    assert k.shape == v.shape == (batch, 2, 35, 4)
    assert k.stride()[1:] == v.stride()[1:] == (4, 8, 1)
    assert q.stride()[1:] == (4, 16, 1)
