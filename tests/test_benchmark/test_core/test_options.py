import pytest

from deform_gqa.benchmark.core import options


@pytest.mark.parametrize(('limit_s', 'past'), [(None, False), (10, False), (3, True)])
def test_deadline(monkeypatch, limit_s, past):
    now_s = 100.0
    monkeypatch.setattr(options.time, 'monotonic', lambda: now_s)
    deadline = options.Deadline(limit_s)
    now_s += 5
    assert deadline.is_past() == past
