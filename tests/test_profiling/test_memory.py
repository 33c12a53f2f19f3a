import pytest
import torch

from deform_gqa.profiling import memory
from deform_gqa.profiling.memory import PeakMemory, unmeasurable_reason

CPU = torch.device('cpu')
measurable = pytest.mark.skipif(
    unmeasurable_reason(CPU) is not None, reason=str(unmeasurable_reason(CPU))
)


@measurable
@pytest.mark.parametrize('mib', [40, 160, 40])
def test_peak_of_freed_tensors(mib):
    torch.ones(2**18).sum()  # the first call loads code into memory
    with PeakMemory(CPU) as peak:
        torch.ones(mib * 2**18).sum()
        torch.ones(2**18)
    assert peak.extra_mib == pytest.approx(mib, abs=6)


@measurable
def test_memory_in_use_before_does_not_count():
    kept = torch.ones(100 * 2**18)
    with PeakMemory(CPU) as peak:
        torch.ones(20 * 2**18)
    assert peak.extra_mib == pytest.approx(20, abs=6)
    assert kept.numel()


def test_other_devices_and_systems_give_none(monkeypatch):
    assert 'meta' in unmeasurable_reason(torch.device('meta'))
    with PeakMemory(torch.device('meta')) as peak:
        pass
    assert peak.extra_mib is None
    monkeypatch.setattr(memory.sys, 'platform', 'darwin')
    assert 'darwin' in unmeasurable_reason(CPU)


def test_unwritable_counter_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(memory.sys, 'platform', 'linux')
    monkeypatch.setattr(memory, '_CLEAR_REFS', tmp_path / 'absent' / 'clear_refs')
    assert 'no resettable peak' in unmeasurable_reason(CPU)
    monkeypatch.setattr(memory, '_CLEAR_REFS', tmp_path / 'clear_refs')
    monkeypatch.setattr(memory, '_STATUS', tmp_path / 'status')
    (tmp_path / 'status').write_text('VmRSS:   2048 kB\n')
    assert 'VmHWM' in unmeasurable_reason(CPU)
    assert memory._read_mib(tmp_path / 'status', 'VmRSS') == 2
    with pytest.raises(OSError, match='status has no entry VmHWM'):
        memory._read_mib(tmp_path / 'status', 'VmHWM')
