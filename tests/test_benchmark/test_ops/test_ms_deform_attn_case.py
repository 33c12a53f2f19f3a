"""The case of ms_deform_attn: its shapes, its work, and others' code for it."""

import sys

import pytest
import torch
from torch.testing import assert_close

from deform_gqa.benchmark.core.errors import OptionError
from deform_gqa.benchmark.ops import backends, mmcv_ms_deform, msda_triton
from deform_gqa.benchmark.ops.gate import Gate
from deform_gqa.benchmark.ops.ms_deform_attn import MsDeformAttnCase
from deform_gqa.benchmark.ops.roofline import count_work

CPU, CUDA = torch.device('cpu'), torch.device('cuda')
STAND_IN = """
from deform_gqa.ops import ms_deform_attn

def triton_multiscale_deformable_attention(
    value, shapes, locations, weights, padding_mode, align_corners
):
    assert padding_mode == 'zeros' and not align_corners
    out = ms_deform_attn(value, shapes, None, locations, weights)
    return out.unflatten(2, (value.shape[2], -1))
"""


def case(queries=None, kv_heads='full', batch=1):
    return MsDeformAttnCase.at_size((800, 1333), queries, batch, kv_heads)


def test_shapes_of_detection():
    encoder, decoder = case(), case(300, 'half', 2)
    assert encoder.level_sizes == [(100, 167), (50, 84), (25, 42), (13, 21)]
    assert encoder.num_queries == encoder.num_keys == 22_223
    assert decoder.num_keys == 22_223 and decoder.num_queries == 300
    specs = decoder.input_specs(torch.bfloat16)
    assert specs['value'] == ((2, 22_223, 4, 32), torch.bfloat16)
    assert specs['sampling_locations'] == ((2, 300, 8, 4, 4, 2), torch.float32)
    assert specs['attention_weights'] == ((2, 300, 8, 4, 4), torch.bfloat16)
    assert decoder.output_spec(torch.bfloat16) == ((2, 300, 256), torch.bfloat16)


def test_names():
    found = MsDeformAttnCase.combinations([(800, 1333)], [2], ['full', 'one'])
    assert [x.name for x in found] == [
        f'ms_deform_attn/800x1333/{part}/b2/kv{count}of8'
        for part in ('encoder', 'decoder300', 'decoder900')
        for count in (8, 1)
    ]


@pytest.mark.parametrize('queries', [None, 300])
def test_samples_are_as_those_of_a_layer(queries):
    small = case(queries).reduced(200_000)
    inputs = small.make_inputs(CPU, torch.float32)
    weights = inputs['attention_weights']
    assert_close(weights.sum((3, 4)), torch.ones(weights.shape[:3]))
    assert inputs['spatial_shapes'].prod(1).sum() == small.num_keys
    locations = inputs['sampling_locations']
    assert locations.is_leaf and locations.requires_grad
    inside = ((locations >= 0) & (locations <= 1)).all(-1).float().mean()
    assert 0.3 < inside < 1  # the coarsest maps are smaller than the spread
    # none near a pixel's centre, where slopes change
    pixels = locations * inputs['spatial_shapes'].flip(1)[:, None] - 0.5
    assert (pixels - pixels.round()).abs().min() > 0.01


def test_work():
    """The weights are given: no exponentials, and no other product than the sums."""
    found = count_work(case(), torch.bfloat16, 'forward')
    samples = 22_223 * 8 * 16
    assert (found.samples, found.exps) == (samples, 0)
    assert found.gathered_bytes == samples * 4 * 32 * 2
    assert found.flops == 2 * samples * 4 * 32
    moved = 2 * 22_223 * 256 * 2 + samples * (2 + 8)
    assert found.bytes == moved
    both = count_work(case(), torch.bfloat16, 'forward+backward')
    assert both.flops == 3 * found.flops
    assert both.bytes == moved + 22_223 * 256 * 2 * 3 + 2 * samples * (2 + 8)


@pytest.mark.parametrize('queries', [None, 300])
def test_gate(queries):
    pytest.importorskip('mmcv._ext')
    gate = Gate(CPU, torch.float32)
    gate.max_pairs = 40_000
    for backend in ('torch', 'mmcv'):
        gate.check(case(queries), backend)


def test_what_mmcv_cannot():
    pytest.importorskip('mmcv._ext')
    reason = mmcv_ms_deform.unsupported_reason
    assert reason(case(), CPU, torch.bfloat16) is None
    assert 'grouped' in reason(case(kv_heads='one'), CPU, torch.float32)
    assert 'bfloat16' in reason(case(), CUDA, torch.bfloat16)


def test_without_mmcv(monkeypatch):
    monkeypatch.setattr(mmcv_ms_deform, 'is_available', lambda: False)
    reason = mmcv_ms_deform.unsupported_reason(case(), CPU, torch.float32)
    assert reason == 'mmcv with its compiled ops is not installed'


@pytest.fixture
def copy(tmp_path, monkeypatch):
    package = tmp_path / 'msda_triton'
    package.mkdir()
    (package / '__init__.py').touch()
    (package / 'frontend.py').write_text(STAND_IN)
    monkeypatch.setenv(msda_triton.COPY.variable, str(tmp_path))
    yield package
    for name in ('msda_triton', 'msda_triton.frontend'):
        sys.modules.pop(name, None)


def test_what_msda_triton_cannot(monkeypatch, tmp_path):
    reason = msda_triton.unsupported_reason
    monkeypatch.delenv(msda_triton.COPY.variable, raising=False)
    assert 'names no folder' in reason(case(), CUDA, torch.float32)
    assert 'msda-triton' not in backends.default_backends()
    monkeypatch.setenv(msda_triton.COPY.variable, str(tmp_path))
    assert 'msda-triton' in backends.default_backends()
    assert reason(case(), CUDA, torch.float16) is None
    assert 'CUDA only' in reason(case(), CPU, torch.float32)
    assert 'bfloat16' in reason(case(), CUDA, torch.bfloat16)
    assert 'grouped' in reason(case(kv_heads='one'), CUDA, torch.float32)


def test_msda_triton_of_a_folder(copy):
    gate = Gate(CPU, torch.float32)
    gate.max_pairs = 40_000
    gate.check(case(300), 'msda-triton')


def test_a_folder_without_msda_triton(copy):
    (copy / 'frontend.py').write_text('')
    with pytest.raises(OptionError, match=r'holds no msda_triton\.frontend\.triton_'):
        msda_triton.COPY.load()
