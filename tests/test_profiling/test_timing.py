import pytest

from deform_gqa.profiling.timing import Timing


def test_timing_statistics():
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0, 6.0))
    assert timing.samples_ms[0] == 5.0  # the order is kept
    assert timing.median_ms == 3.5
    assert timing.mean_ms == 3.5
    assert timing.p20_ms == pytest.approx(2.0)
    assert timing.p80_ms == pytest.approx(5.0)
