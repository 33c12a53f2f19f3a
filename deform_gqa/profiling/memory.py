"""Peak memory of calls beyond what was in use before: CUDA, and CPU on Linux."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS = Path('/proc/self/status')
_CLEAR_REFS = Path('/proc/self/clear_refs')
_MEMINFO = Path('/proc/meminfo')
_RESET_PEAK = '5'
_MIB = 2**20


def _read_mib(path: Path, key: str) -> float:
    """Value of a line like ``VmRSS:   1234 kB`` of a /proc file."""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(':')
        if name == key:
            return int(value.split()[0]) / 1024
    raise OSError(f'{path} has no entry {key}')


def available_cpu_mib() -> float | None:
    """Memory that can be taken without swapping; None where that is unknown."""
    return _read_mib(_MEMINFO, 'MemAvailable') if _MEMINFO.exists() else None


def unmeasurable_reason(device: torch.device) -> str | None:
    """Why the peak memory of this device cannot be measured, or None."""
    if device.type == 'cuda':
        return None
    if device.type != 'cpu':
        return f'no memory counter for {device.type} devices'
    if not sys.platform.startswith('linux'):
        return f'the CPU peak is read from /proc, which {sys.platform} has not'
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        _read_mib(_STATUS, 'VmHWM')
    except OSError as error:
        return f'the kernel gives no resettable peak: {error}'
    return None


def _return_free_memory(collect: bool) -> None:
    """Give freed heap pages back, else they would hide in the baseline."""
    if collect:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # glibc has it, musl not
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Collecting garbage looks at new objects alone: those of imports are many."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class PeakMemory:
    """Context manager: ``extra_mib`` is the peak inside it over the use at entry.

    On a CPU that is the peak of resident memory of the whole process, on CUDA the
    peak of the caching allocator. None where it cannot be measured.

    Args:
        device: 'cpu' or 'cuda'.
        collect: Collect garbage first, which takes long beside large packages.
    """

    def __init__(self, device: torch.device, collect: bool = True):
        self.device = device
        self.collect = collect
        self.extra_mib: float | None = None
        self._reason = unmeasurable_reason(device)

    def __enter__(self) -> 'PeakMemory':
        if self._reason is not None:
            return self
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device) / _MIB
        else:
            _return_free_memory(self.collect)
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._before = _read_mib(_STATUS, 'VmRSS')
        return self

    def __exit__(self, *exception: object) -> None:
        if self._reason is not None:
            return
        if self.device.type == 'cuda':
            peak = torch.cuda.max_memory_allocated(self.device) / _MIB
        else:
            peak = _read_mib(_STATUS, 'VmHWM')
        self.extra_mib = max(peak - self._before, 0.0)
