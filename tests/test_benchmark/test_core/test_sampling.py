import time

import pytest
import torch
from torch.utils import benchmark

from deform_gqa.benchmark.core.sampling import (
    MAX_SAMPLES,
    MIN_SAMPLES,
    Sampling,
    Timer,
)

CPU = torch.device('cpu')


def test_sampling_count():
    assert Sampling(repeats=7).count(100.0) == 7
    assert Sampling(min_time_s=1.0).count(0.1) == 10
    assert Sampling(min_time_s=1.0).count(100.0) == MIN_SAMPLES
    assert Sampling(min_time_s=1.0).count(0.0) == MAX_SAMPLES


@pytest.mark.parametrize(
    ('options', 'name'),
    [(dict(repeats=0), 'repeats'), (dict(min_time_s=0.0), 'min_time_s')],
)
def test_sampling_errors(options, name):
    with pytest.raises(ValueError, match=name):
        Sampling(**options)


def test_timer_warms_up_and_keeps_all_samples():
    calls = []
    timer = Timer(CPU, Sampling(repeats=4))
    count = timer.warm_up(lambda: calls.append(time.sleep(0.01)))
    warm_up_calls = len(calls)
    samples = timer.sample(lambda: calls.append(time.sleep(0.01)), count)
    assert warm_up_calls >= 1
    assert len(calls) - warm_up_calls == len(samples) == 4
    assert min(samples) >= 10


def test_timer_agrees_with_torch():
    """Minima, which other processes disturb least."""
    x = torch.randn(256, 256)
    timer = Timer(CPU, Sampling(repeats=50))
    ours_ms = min(timer.sample(lambda: x @ x, timer.warm_up(lambda: x @ x)))
    threads = torch.get_num_threads()
    torchs = benchmark.Timer('x @ x', globals={'x': x}, num_threads=threads)
    torchs_ms = min(torchs.timeit(1).median * 1e3 for _ in range(50))
    assert ours_ms == pytest.approx(torchs_ms, rel=0.5)
