import weakref

import pytest
import torch
from torch import nn

from deform_gqa.benchmark.core import run
from deform_gqa.benchmark.core.cases import Case, NotRun, Workload
from deform_gqa.benchmark.core.options import MeasureOptions
from deform_gqa.benchmark.core.report import Row
from deform_gqa.benchmark.core.run import expected_failure, measure
from deform_gqa.benchmark.core.sampling import Sampling


def make_options(backends=('naive',), time_limit_s=None):
    return MeasureOptions(
        device=torch.device('cpu'),
        sampling=Sampling(repeats=2, min_time_s=1e-6),
        threads=None,
        time_limit_s=time_limit_s,
        out=None,
        backends=backends,
        directions=('forward', 'train'),
        sizes=(),
        batch_sizes=(),
        kv_heads=(),
    )


def make_case(name, call, **options):
    def build(backend):
        calls = dict.fromkeys(('forward', 'train'), call)
        return Workload(backend, calls, **options)

    return Case(name, {'params': None}, 3, build)


def test_cases_of_a_group_take_turns():
    calls = []
    cases = [make_case(n, lambda n=n: calls.append(n)) for n in 'ab']
    rows = measure([cases], make_options())
    assert ''.join(calls[-4:]) == 'abab'
    found = [(row.case, row.direction, row.status) for row in rows]
    assert found == [(n, d, 'ok') for d in ('forward', 'train') for n in 'ab']
    assert all(len(row.timing.samples_ms) == 2 for row in rows)
    assert rows[0].work == {'flops': 0, 'images': 3}


def test_memory_of_the_first_call_and_what_was_resident(monkeypatch):
    class FakePeak:
        extra_mib = None

        def __init__(self, device):
            pass

        def __enter__(self):
            assert self.extra_mib is None

        def __exit__(self, *exception):
            self.extra_mib = 5.0

    monkeypatch.setattr(run, 'PeakMemory', FakePeak)
    cases = [make_case('a', list), make_case('b', list, resident_mib=20.0)]
    for groups in ([cases[:1], cases[1:]], [cases]):
        rows = measure(groups, make_options())
        found = {(row.case, row.peak_memory_mib) for row in rows}
        assert found == {('a', 5.0), ('b', 25.0)}


def test_the_same_weights_for_every_backend():
    weights = []

    def build(backend):
        weights.append(torch.rand(()).item())
        return Workload(backend, dict.fromkeys(('forward', 'train'), list))

    measure([[Case('a', {}, 1, build)]], make_options(('naive', 'torch')))
    assert len(weights) == 2 and weights[0] == weights[1]


def test_what_cannot_run_is_listed():
    def fail():
        raise RuntimeError('no such shape')

    def refuse(backend):
        raise NotRun('unsupported', f'no {backend}')

    groups = [[make_case('a', fail, is_foreign=True)], [Case('b', {}, 1, refuse)]]
    found = {(r.case, r.status, r.reason) for r in measure(groups, make_options())}
    assert found == {
        ('a', 'failed', 'RuntimeError: no such shape'),
        ('b', 'unsupported', 'no naive'),
    }
    with pytest.raises(RuntimeError, match='no such shape'):
        measure([[make_case('a', fail)]], make_options())


def test_nothing_is_called_past_the_time_limit():
    def fail():
        raise AssertionError

    rows = measure([[make_case('a', fail, check=fail)]], make_options(time_limit_s=0))
    assert [row.status for row in rows] == ['skipped', 'skipped']


def test_checks_without_samples():
    checks = []
    case = make_case('a', checks.clear, check=lambda: checks.append('a'))
    [row, _] = measure([[case]], make_options(), sampler=None)
    assert (row.status, row.timing, checks) == ('ok', None, ['a'])


def test_a_model_is_gone_before_the_next_is_built():
    models = []

    def build(backend):
        assert all(model() is None for model in models)
        model = nn.Linear(2, 2)
        models.append(weakref.ref(model))
        calls = {'forward': model.parameters, 'train': model.parameters}
        return Workload(backend, calls, model=model)

    case = Case('a', {'params': None}, 1, build)
    assert len(measure([[case]], make_options(('naive', 'torch')))) == 4
    assert case.fields['params'] == 6
    assert len(models) == 2


@pytest.mark.parametrize(
    ('error', 'amp', 'expected'),
    [
        (torch.OutOfMemoryError('CUDA out of memory'), None, True),
        (RuntimeError('DefaultCPUAllocator: not enough memory'), None, True),
        (NotImplementedError('"nms" not implemented for Half'), torch.float16, True),
        (NotImplementedError('"nms" not implemented for Half'), None, False),
        (RuntimeError('expected scalar type Float'), torch.bfloat16, True),
        (RuntimeError('a defect'), torch.float16, False),
    ],
)
def test_failures(error, amp, expected):
    """Memory may run out, mixed precision may lack a kernel; others are defects."""
    if not expected:
        with pytest.raises(type(error)), expected_failure(amp):
            raise error
        return
    with pytest.raises(NotRun) as failure, expected_failure(amp):
        raise error
    assert failure.value.status == 'failed'
    assert str(failure.value) == f'{type(error).__name__}: {error}'


def test_a_baseline_may_fail():
    with (
        pytest.raises(NotRun, match='RuntimeError: no such shape'),
        expected_failure(None, is_foreign=True),
    ):
        raise RuntimeError('no such shape')


def test_the_limit_that_binds_is_the_longest():
    row = Row('a', 'triton', 'forward', roofline_us={'exp': 3.0, 'bytes': 5.0})
    assert row.least_us == 5.0
    assert Row('a', 'triton', 'forward').least_us is None
    # The files keep the name that users have.
    assert row.to_json()['floor_us'] == {'exp': 3.0, 'bytes': 5.0}
    assert Row.from_json(row.to_json()) == row
