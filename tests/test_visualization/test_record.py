"""Recorded points and weights are what the modules computed."""

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import MultiScaleDeformableAttention
from torch import nn
from torch.testing import assert_close

from deform_gqa.models import DeformableGQA, MSDeformAttn
from deform_gqa.models.layers.heads import merge_heads
from deform_gqa.ops import ms_deform_attn
from deform_gqa.visualization import record_attention

BIASES = {
    'table': dict(table_size=(6, 5), num_kv_heads=2, offset_groups=2),
    'log_cpb': dict(num_kv_heads=1),
    'fixed': dict(table_size=(6, 5)),
    'dwc': dict(offset_range_factor=2),
}


def wrapped(module):
    torch.manual_seed(0)
    model = nn.ModuleDict({'attn': module}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize('bias', BIASES)
def test_weights_reproduce_the_output_of_a_deformable_block(bias):
    model = wrapped(
        DeformableGQA(16, 4, stride=1, position_bias=bias, **BIASES[bias]).double()
    )
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    with record_attention(model) as records:
        actual = model['attn'](x)
    record = records['attn']
    weights = torch.stack([record.weights(n) for n in range(30)], 2)  # B Hq N S
    assert_close(weights.sum(-1), torch.ones(2, 4, 30, dtype=torch.float64))
    values = record.values.repeat_interleave(4 // record.values.shape[1], 1)
    out = merge_heads(weights @ values, (6, 5))
    if bias == 'dwc':
        out = out + model['attn'].rpe_table(model['attn'].proj_q(x))
    assert_close(model['attn'].proj_out(out), actual)


def test_points_are_where_the_map_was_sampled():
    """grid_sample at the recorded points, in its own coordinates, gives the samples."""
    model = wrapped(DeformableGQA(8, 2, offset_groups=2, stride=2, position_bias=None))
    x = torch.randn(1, 8, 7, 12)
    with record_attention(model) as records:
        model['attn'](x)
    record = records['attn']
    grid = record.sampled[0].unsqueeze(1) * 2 - 1  # (G, 1, S, 2), as of image borders
    maps = F.grid_sample(x.unflatten(1, (2, 4))[0], grid, align_corners=False)
    values = model['attn'].proj_v(maps.flatten(0, 1)[None])  # (1, C, 1, S)
    assert_close(record.values, values.unflatten(1, (2, 4)).squeeze(3).mT)
    assert len(record.reference) == record.sampled.shape[2]
    assert_close(record.query_points[0, 14], torch.tensor([2.5 / 12, 1.5 / 7]))
    assert record.nearest_query(0, (2.6 / 12, 1.4 / 7)) == 14


def test_heads_have_the_samples_of_their_group():
    model = wrapped(DeformableGQA(8, 4, offset_groups=2, stride=2, position_bias=None))
    with record_attention(model) as records:
        model['attn'](torch.randn(1, 8, 6, 6))
    record = records['attn']
    points, weights = record.samples(0, 3)
    assert points.shape == (4, 9, 2) and weights.shape == (4, 9)
    for head in range(4):
        assert_close(points[head], record.sampled[0, head // 2])


@pytest.mark.parametrize('cls', [MSDeformAttn, MultiScaleDeformableAttention])
@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('numbers', [2, 4])
def test_weights_reproduce_the_output_of_ms_deform_attn(cls, batch_first, numbers):
    shapes = torch.tensor([[4, 6], [2, 3]])
    model = wrapped(
        cls(16, num_heads=2, num_levels=2, num_points=3, batch_first=batch_first)
    )
    query, query_pos = torch.randn(2, 2, 5, 16).unbind()
    value = torch.randn(2, 30, 16)
    call = dict(query=query, query_pos=query_pos, value=value)
    if not batch_first:
        call = {name: x.transpose(0, 1) for name, x in call.items()}
    with record_attention(model, 'at+n') as records:
        actual = model['attn'](
            **call,
            identity=torch.zeros_like(call['query']),
            reference_points=torch.rand(2, 5, 2, numbers),
            spatial_shapes=shapes,
            level_start_index=torch.tensor([0, 24]),
        )
    record = records['attn']
    out = ms_deform_attn(
        model['attn'].value_proj(value).unflatten(2, (2, 8)),
        shapes,
        None,
        record.points.unflatten(3, (2, 3)),
        record.weights.unflatten(3, (2, 3)),
    )
    out = model['attn'].output_proj(out)
    assert_close(out if batch_first else out.transpose(0, 1), actual)
    points, weights = record.samples(1, 4)
    assert points.shape == (2, 6, 2)
    assert_close(weights.sum(-1), torch.ones(2))


def test_hooks_are_gone_afterwards():
    model = wrapped(DeformableGQA(8, 2, stride=2, position_bias=None))
    with record_attention(model) as records:
        pass
    model['attn'](torch.randn(1, 8, 4, 4))
    assert not records and not model['attn']._forward_pre_hooks


def test_models_that_cannot_be_recorded():
    with pytest.raises(ValueError, match='eval mode, got training'):
        record_attention(nn.Linear(1, 1)).__enter__()
    model = wrapped(DeformableGQA(8, 2, use_offset=False))
    with pytest.raises(ValueError, match="fits ''"):
        record_attention(model).__enter__()
    model = wrapped(DeformableGQA(8, 2, position_bias=None))
    with pytest.raises(ValueError, match="fits 'decoder'"):
        record_attention(model, 'decoder').__enter__()
