import functools

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from deform_gqa.benchmark.core.errors import GateError
from deform_gqa.benchmark.ops import backends
from deform_gqa.benchmark.ops.case import StageCase
from deform_gqa.benchmark.ops.deform_attn import flex_deform_attn
from deform_gqa.benchmark.ops.deform_sdpa import QUICK_SWEEP, sdpa_cases
from deform_gqa.benchmark.ops.gate import Gate, errors_of
from deform_gqa.benchmark.ops.neighborhood_attn import FlexNeighborhoodAttn
from deform_gqa.benchmark.ops.registry import OP_CASES

CASES = {op: x for op, x in OP_CASES.items() if issubclass(x, StageCase)}
CPU = torch.device('cpu')


@pytest.mark.parametrize('kv_heads', ['full', 'one'])
@pytest.mark.parametrize('backend', ['torch', 'sdpa-bias'])
@pytest.mark.parametrize('op', CASES)
def test_gate_passes_what_is_right(op, backend, kv_heads):
    gate = Gate(CPU, torch.float32)
    gate.max_pairs = 30_000
    gate.check(CASES[op].at_stage((800, 1333), 1, 2, kv_heads), backend)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('op', CASES)
def test_gate_in_low_precision(op, dtype):
    gate = Gate(CPU, dtype)
    gate.max_pairs = 30_000
    gate.check(CASES[op].at_stage((800, 1333), 2, 1, 'half'), 'torch')


def test_gate_where_a_query_has_one_key():
    """Its gradients of q, k and the bias are zero, but for rounding."""
    case = CASES['deform_attn'].at_stage((8, 8), 1, 2, 'full')
    assert case.keys_per_query == 1
    Gate(CPU, torch.float32).check(case, 'torch')
    reference = {'out': torch.ones(2, 2).double(), 'grad_q': torch.zeros(2)}
    wrong = {'out': torch.ones(2, 2), 'grad_q': torch.full((2,), -1e-3)}
    assert errors_of(wrong, reference) == {'out': 0, 'grad_q': pytest.approx(1e-3)}


@pytest.mark.parametrize('fault', ['scale', 'nan', 'grad'])
def test_gate_stops_what_is_wrong(monkeypatch, fault):
    right = backends.make_call

    def wrong(tensors):
        out = right(case, 'naive')(tensors)
        if fault == 'grad':  # the right output, without its dependence on v
            return out.detach() + (out - out.detach()) * 1.05
        return out * (1.05 if fault == 'scale' else float('nan'))

    def make_call(case, backend):
        return wrong if backend == 'torch' else right(case, backend)

    monkeypatch.setattr('deform_gqa.benchmark.ops.gate.make_call', make_call)
    gate = Gate(CPU, torch.float32)
    gate.max_pairs = 30_000
    case = gate.small_case(CASES['deform_attn'].at_stage((224, 224), 3, 1, 'full'))
    wanted = 'grad_q' if fault == 'grad' else 'out'
    with pytest.raises(GateError, match=f'torch is wrong on deform_attn.*{wanted} is'):
        gate.check(case, 'torch')


@pytest.mark.parametrize(
    ('op', 'baseline'),
    [
        ('deform_attn', lambda *args: functools.partial(flex_deform_attn, *args)),
        ('neighborhood_attn', FlexNeighborhoodAttn),
    ],
)
# Uncompiled, it warns of being slow.
@pytest.mark.filterwarnings('ignore:flex_attention called without')
def test_flex_baselines_compute_the_same(monkeypatch, op, baseline):
    """Forward, the part that runs on a CPU, in plain torch; the gate does the rest."""
    module = 'torch.nn.attention.flex_attention'
    monkeypatch.setattr(f'{module}._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG', True)
    case = CASES[op].at_stage((800, 1333), 2, 1, 'half').reduced(20_000)
    inputs = {n: x.detach() for n, x in case.make_inputs(CPU, torch.float32).items()}
    out = baseline(case, flex_attention)(inputs)
    wanted = backends.make_call(case, 'naive')(inputs)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-4)


def test_reasons():
    case = CASES['deform_attn'].at_stage((800, 1333), 1, 1, 'full')
    for backend, reason in (('flex', 'no backward pass on CPUs'), ('triton', '')):
        found = backends.unsupported_reason(case, backend, CPU, torch.float32)
        assert found is not None
        assert reason in found
    for backend in ('naive', 'torch', 'sdpa-bias'):
        assert backends.unsupported_reason(case, backend, CPU, torch.float32) is None
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cuda'"):
        backends.make_call(case, 'cuda')
    case = sdpa_cases(QUICK_SWEEP, ['full'])[0]
    with pytest.raises(ValueError, match="'flex' is not written for deform_sdpa"):
        backends.make_call(case, 'flex')


def test_calls_that_do_not_fit_are_known_before(monkeypatch):
    case = CASES['deform_attn'].at_stage((800, 1333), 1, 1, 'full')
    # 140 M pairs: 0.5 GiB a tensor
    assert 2500 < backends.materialised_mib(case, 'naive') < 3000
    assert backends.materialised_mib(case, 'torch') == 0
    monkeypatch.setattr(backends, 'available_cpu_mib', lambda: 1024.0)
    reason = backends.out_of_memory_reason(case, 'naive', CPU)
    assert reason == 'needs about 2.6 GiB, 1.0 GiB are free'
    assert backends.out_of_memory_reason(case, 'torch', CPU) is None
    monkeypatch.setattr(backends, 'available_cpu_mib', lambda: None)
    assert backends.out_of_memory_reason(case, 'naive', CPU) is None
