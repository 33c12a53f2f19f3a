import pytest
import torch

from deform_gqa.benchmark.core.kv_heads import kv_head_counts
from deform_gqa.benchmark.ops import backends
from deform_gqa.benchmark.ops.deform_sdpa import DEFAULT_SWEEP, SdpaSweep, sdpa_cases
from deform_gqa.benchmark.ops.gate import Gate
from deform_gqa.benchmark.ops.roofline import PEAKS, count_work, roofline

CPU = torch.device('cpu')
PUBLISHED = dict(heads=(32,), views=(6,), points=(12,))
H100 = PEAKS['NVIDIA H100 80GB HBM3']


def one_case(grid_size=(18, 18), kv_heads='full', **lists):
    [case] = sdpa_cases(SdpaSweep((grid_size,), **{**PUBLISHED, **lists}), [kv_heads])
    return case


def test_published_shapes():
    case = one_case(kv_heads='half')
    assert case.name == 'deform_sdpa/18x18/b2/kv16of32/v6p12'
    specs = case.input_specs(torch.bfloat16)
    assert specs['q'] == ((2, 6, 32, 324, 32), torch.bfloat16)
    assert specs['k'] == specs['v'] == ((2, 6, 16, 324, 32), torch.bfloat16)
    assert specs['coords'] == ((2, 6, 324, 6, 12, 2), torch.float32)


def test_default_cases():
    cases = sdpa_cases(DEFAULT_SWEEP, ['full'])
    assert len({case.name for case in cases}) == len(cases)
    assert {case.batch for case in cases} == {2}
    ends = {(c.views, c.points) for c in cases if c.num_heads == 8}
    assert {(2, 2), (2, 12), (12, 2), (12, 12)} <= ends
    heads = [c.num_kv_heads for c in cases if c.num_heads == 32]
    assert sorted(set(heads)) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ('heads', 'choices', 'counts'),
    [
        (8, ['sweep'], [8, 4, 2, 1]),
        (12, ['sweep'], [12, 6, 3, 1]),
        (1, ['sweep', 'half'], [1]),
        (2, ['one', 'full', 'half'], [1, 2]),
    ],
)
def test_kv_head_counts(heads, choices, counts):
    assert kv_head_counts(heads, choices) == counts


def test_counts():
    case = one_case(kv_heads='half')
    work = count_work(case, torch.float32, 'forward')
    queries, keys = 2 * 6 * 324, 6 * 12
    samples, pairs = queries * keys * 16, queries * keys * 32
    assert (work.samples, work.pairs, work.exps) == (samples, pairs, pairs)
    assert work.gathered_bytes == samples * 2 * 4 * 32 * 4
    # q k^T and P v; four corners of a key and of a value
    assert work.flops == 2 * 32 * (2 * pairs + 8 * samples)
    q, kv = queries * 32 * 32, queries * 16 * 32
    assert work.bytes == 4 * (2 * q + 2 * kv + queries * keys * 2)
    both = count_work(case, torch.bfloat16, 'forward+backward')
    # read twice as bf16, scattered as float32
    assert both.gathered_bytes == 2 * work.gathered_bytes
    assert both.flops == 2 * 32 * (7 * pairs + 3 * 8 * samples)


def test_grouped_heads_divide_what_is_gathered():
    full, one = (
        count_work(one_case(kv_heads=choice), torch.float32, 'forward')
        for choice in ('full', 'one')
    )
    assert full.gathered_bytes == 32 * one.gathered_bytes
    assert full.pairs == one.pairs
    peaks = [roofline(work, torch.float32, H100) for work in (full, one)]
    full_us, one_us = (max(times.values()) for times in peaks)
    assert full_us >= one_us > 0


def test_inputs():
    case = one_case((5, 1), heads=(4,), views=(2,), points=(3,), kv_heads='half')
    inputs = case.make_inputs(CPU, torch.bfloat16)
    again = case.make_inputs(CPU, torch.bfloat16)
    for name, (shape, dtype) in case.input_specs(torch.bfloat16).items():
        assert (inputs[name].shape, inputs[name].dtype) == (shape, dtype)
        assert inputs[name].is_leaf
        assert inputs[name].requires_grad
        assert torch.equal(inputs[name], again[name])
    coords = inputs['coords'].detach()
    assert coords.min() >= 0
    assert coords.max() <= 1
    rows = coords[..., 1] * 4
    assert (rows - rows.round()).abs().min() > 0.01


def test_reduced():
    small = one_case((14, 18), kv_heads='one').reduced(2_000_000)
    assert small.pairs <= 500_000
    assert (small.batch, small.grid_size, small.num_kv_heads) == (1, (4, 5), 1)
    assert (small.views, small.points) == (6, 12)
    assert small.reduced(1).grid_size == (2, 2)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kv_heads', ['full', 'half', 'one'])
def test_gate(dtype, kv_heads):
    case = one_case((5, 7), kv_heads, heads=(4,), views=(2,), points=(3,))
    Gate(CPU, dtype).check(case, 'torch')


def test_baselines():
    case = one_case()
    for backend in ('sdpa-bias', 'flex'):
        reason = backends.unsupported_reason(case, backend, CPU, torch.float32)
        assert reason == f'{backend} does not compute deform_sdpa'
    # 9 M pairs of 32 values: 1.1 GiB a tensor
    assert 4000 < backends.materialised_mib(case, 'naive') < 5000
    assert backends.materialised_mib(case, 'torch') == 0
