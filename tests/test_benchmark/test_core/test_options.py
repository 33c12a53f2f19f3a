import argparse

import pytest

from deform_gqa.benchmark.core import options


@pytest.mark.parametrize(('limit_s', 'past'), [(None, False), (10, False), (3, True)])
def test_deadline(monkeypatch, limit_s, past):
    now_s = 100.0
    monkeypatch.setattr(options.time, 'monotonic', lambda: now_s)
    deadline = options.Deadline(limit_s)
    now_s += 5
    assert deadline.is_past() == past


@pytest.mark.parametrize(
    ('quick', 'threads', 'found', 'seconds'),
    [(True, None, 1, 0.2), (True, 2, 2, 0.2), (False, None, None, 0.5)],
)
def test_quick_takes_one_thread_and_less_time(quick, threads, found, seconds):
    parser = argparse.ArgumentParser()
    options.add_measure_arguments(parser, ['naive'], ['forward'], 'little', str)
    args = parser.parse_args(['--device', 'cpu'])
    args.quick, args.threads = quick, threads
    defaults = dict(backends=['naive'], sizes=[], batch_sizes=[], kv_heads=[])
    fields = options.resolve_measure(args, ['forward'], **defaults)
    assert (fields['threads'], fields['sampling'].min_time_s) == (found, seconds)
