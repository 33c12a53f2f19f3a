import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deform_gqa.benchmark.core.flops import count_flops
from deform_gqa.benchmark.ops.backends import make_call
from deform_gqa.benchmark.ops.case import StageCase
from deform_gqa.benchmark.ops.deform_sdpa import SdpaSweep, sdpa_cases
from deform_gqa.benchmark.ops.registry import OP_CASES
from deform_gqa.benchmark.ops.workload import op_calls
from deform_gqa.models.layers import DeformableGQA

CASES = [
    case.at_stage((64, 96), 2, 2, 'half')
    for case in OP_CASES.values()
    if issubclass(case, StageCase)
]
CASES += sdpa_cases(SdpaSweep(((5, 6),), (4,), (2,), (3,), (1,)), ['half'])


@pytest.mark.parametrize('backend', ['naive', 'torch'])
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.op)
def test_ops_count_alike_whatever_the_backend(case, backend):
    """q k^T and P v: two products of D multiply-adds a pair, and their gradients."""
    inputs = case.make_inputs(torch.device('cpu'), torch.float32)
    grad_out = case.make_grad_out(torch.device('cpu'), torch.float32)
    products = 2 * 2 * case.pairs * case.head_dim
    for direction, factor in (('forward', 1), ('forward+backward', 3)):
        call = op_calls(make_call(case, backend), inputs, grad_out)[direction]
        assert count_flops(call) == factor * products


@pytest.mark.parametrize(
    ('conv', 'pixels'),
    [
        (nn.Conv2d(8, 16, 3, stride=2, padding=1), 2 * 5 * 6),
        (nn.Conv2d(8, 16, 3, padding=1, groups=4), 2 * 9 * 11),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), 2 * 9 * 11),
        (nn.ConvTranspose2d(8, 16, 2, stride=2), 2 * 9 * 11),
    ],
)
def test_convolutions(conv, pixels):
    x = torch.randn(2, 8, 9, 11, requires_grad=True)
    forward = 2 * conv.weight.numel() * pixels
    assert count_flops(lambda: conv(x)) == forward
    assert count_flops(lambda: conv(x).sum().backward()) == 3 * forward
    without_input_gradient = count_flops(lambda: conv(x.detach()).sum().backward())
    assert without_input_gradient == 2 * forward


def test_linear():
    layer, x = nn.Linear(8, 4), torch.randn(5, 8, requires_grad=True)
    assert count_flops(lambda: layer(x)) == 2 * 5 * 8 * 4
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 5 * 8 * 4


@pytest.mark.parametrize('masked', [False, True])
def test_fused_attention_with_grouped_heads(masked):
    q = torch.randn(2, 4, 10, 8, requires_grad=True)
    k = torch.randn(2, 2, 12, 8, requires_grad=True)
    mask = torch.zeros(10, 12) if masked else None

    def attend():
        return F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)

    forward = 2 * 2 * 2 * 4 * 10 * 12 * 8
    assert count_flops(attend) == forward
    assert count_flops(lambda: attend().sum().backward()) == 3 * forward


@torch.no_grad()
def test_the_fast_path_of_attention_is_counted():
    layer = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(1, 6, 16)
    projections, products = 4 * 2 * 6 * 16 * 16, 2 * 2 * 6 * 6 * 16
    assert count_flops(lambda: layer(x, x, x)) == projections + products
    assert torch.backends.mha.get_fastpath_enabled()


@torch.no_grad()
def test_a_layer_by_hand():
    """Projections, the offset network and both products; bias and sampling are free."""
    layer = DeformableGQA(16, 4, 2, stride=2, offset_kernel_size=3, table_size=8)
    x = torch.randn(3, 16, 8, 6)
    queries, keys, kv_dim = 8 * 6, 4 * 3, 8
    projections = 2 * 16 * 16 * queries + 2 * 16 * kv_dim * keys
    offsets = (9 * 16 + 2 * 16) * keys
    products = 2 * queries * keys * 16
    expected = 3 * 2 * (projections + offsets + products)
    for backend in ('naive', 'torch'):
        layer.backend = backend
        assert count_flops(lambda: layer(x)) == expected
