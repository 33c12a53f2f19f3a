"""FLOPs of the fused ops in mmengine's analysis, which mmdet's get_flops.py prints."""

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.analysis.complexity_analysis import ActivationAnalyzer, FlopAnalyzer

import deform_gqa.engine  # noqa: F401
from deform_gqa.models import DAT, MSDeformAttn, NeighborhoodAttention
from deform_gqa.models.layers.per_query_deformable import PerQueryDeformableAttention
from deform_gqa.ops import deform_attn
from deform_gqa.ops.common.backends import OPS

B, C, HEADS, H, W = 2, 16, 2, 6, 8
PAIRS = 2 * B * C * H * W  # multiply-adds with one key for each query: q k and p v


def counted(module, *inputs):
    """Multiply-adds by operator."""
    analyzer = FlopAnalyzer(module.eval(), inputs)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analyzer.by_operator()


def test_neighborhood_attention():
    module = NeighborhoodAttention(C, HEADS, kernel_size=3, backend='torch')
    found = counted(module, torch.randn(B, C, H, W))
    assert found['neighborhood_attn'] == PAIRS * 9


def test_per_query_deformable_attention():
    module = PerQueryDeformableAttention(C, HEADS, num_points=4, backend='torch')
    found = counted(module, torch.randn(B, C, H, W))
    assert found['deform_sdpa'] == PAIRS * 4


class Attention(torch.nn.Module):
    def forward(self, *tensors):
        return deform_attn(*tensors, grid_size=(H, W), backend='torch')


def test_deform_attn():
    q, k, v = (torch.randn(B, HEADS, n, 8) for n in (H * W, 5, 5))
    pos, table = torch.rand(B, 1, 5, 2), torch.randn(HEADS, 11, 15)
    assert counted(Attention(), q, k, v, pos, table)['deform_attn'] == PAIRS * 5


def test_torchs_own_attention():
    """What deform_attn takes where there is no table."""
    q, k, v = (torch.randn(B, HEADS, n, 8) for n in (H * W, 5, 5))
    found = counted(Attention(), q, k, v)
    assert found['scaled_dot_product_attention'] == PAIRS * 5


def test_ms_deform_attn():
    module = MSDeformAttn(C, HEADS, num_levels=2, num_points=3, batch_first=True)
    shapes = torch.tensor([[4, 5], [2, 3]])
    query, value = torch.randn(B, 7, C), torch.randn(B, 26, C)
    points = torch.rand(B, 7, 2, 2)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, query, value):
            return self.attention(
                query,
                value=value,
                reference_points=points,
                spatial_shapes=shapes,
                level_start_index=torch.tensor([0, 20]),
            )

    found = counted(Module(), query, value)
    # four pixels for each of the 2 x 3 samples of a query
    assert found['ms_deform_attn'] == B * 7 * C * 2 * 3 * 4


def test_a_backbone():
    arch = dict(
        embed_dims=(8,) * 4,
        depths=(1,) * 4,
        num_heads=(2,) * 4,
        block_types=('N', 'L', 'D', 'D'),
    )
    backbone = DAT(arch, backend='torch').eval()
    found = get_model_complexity_info(
        backbone, None, inputs=torch.randn(1, 3, 64, 96), show_table=False
    )
    assert found['params'] == sum(p.numel() for p in backbone.parameters())
    ops = counted(backbone, torch.randn(1, 3, 64, 96))
    assert ops['neighborhood_attn'] == 2 * 16 * 24 * 8 * 49
    assert found['flops'] == sum(ops.values())
    activations = ActivationAnalyzer(backbone, (torch.randn(1, 3, 64, 96),))
    assert activations.by_operator()['neighborhood_attn'] == 16 * 24 * 8


@pytest.mark.parametrize('op', ['scaled_dot_product_gqa', 'deform_sample'])
def test_ops_without_a_formula_have_no_handle(op):
    assert op in OPS
    analyzer = FlopAnalyzer(torch.nn.Identity(), (torch.ones(1),))
    assert f'deform_gqa::{op}' not in analyzer._op_handles
