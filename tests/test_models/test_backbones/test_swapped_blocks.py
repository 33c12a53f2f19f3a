"""Every kind of attention in every stage of the backbone, by one line of config."""

import pytest
import torch

from deform_gqa.models import DAT

ARCH = dict(
    embed_dims=(16, 16, 32, 32),
    depths=(1,) * 4,
    num_heads=(2, 2, 4, 4),
    block_types=('D',) * 4,
    table_sizes=(8, 4, 2, 1),
)
KINDS = (
    'DeformableGQA',
    'DepthwiseConv',
    'GroupedQueryAttention',
    'LinformerAttention',
    'MultiHeadAttention',
    'MultiHeadLatentAttention',
    'MultiQueryAttention',
    'NeighborhoodAttention',
    'PerQueryDeformableAttention',
    'PyramidAttention',
    'ShiftedWindowAttention',
    'SingleHeadAttention',
    'WindowAttention',
)


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_stands_in_every_stage(kind):
    torch.manual_seed(0)
    model = DAT(ARCH, num_kv_heads=2, attention=dict(D=dict(type=kind)))
    for size in ((64, 96), (75, 45)):
        outs = model(torch.randn(2, 3, *size))
        assert [out.shape[1] for out in outs] == [16, 16, 32, 32]
        sum(out.square().mean() for out in outs).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
    assert [type(stage.attns[0]).__name__ for stage in model.stages] == [kind] * 4
