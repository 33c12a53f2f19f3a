"""gpu_check.sh on a machine without a GPU: a stub in place of Python, no nvidia-smi."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
*'import xdist'*) exit "${XDIST:-0}" ;;
*'import mmengine'*) exit 1 ;;
*profiling.environment*) exit "${DEVICE:-0}" ;;
*'-m pytest'*) echo 'FAILED tests/test_x.py::test_y - wrong'; sleep "${SLEEP:-0}"
          exit "${TESTS:-0}" ;;
*) exit "${SUITES:-0}" ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    """Runs the script with an environment; returns (result, summary, stub's calls)."""
    stub, out, calls = (tmp_path / name for name in ('python', 'out', 'calls'))
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(*options, **environment):
        calls.write_text('')
        environment = {name: str(value) for name, value in environment.items()}
        result = subprocess.run(
            ['bash', str(ROOT / 'tools/gpu_check.sh'), *(options or (str(out),))],
            env={**os.environ, 'PYTHON': str(stub), 'CALLS': str(calls), **environment},
            capture_output=True,
            text=True,
        )
        path = out / 'summary.txt'
        summary = path.read_text().splitlines() if path.is_file() else []
        outcomes = dict(line.split(': ', 1) for line in summary)
        return result, outcomes, calls.read_text().splitlines()

    run.out = out
    return run


def test_all_is_run_and_packed(check):
    result, outcomes, calls = check()
    assert result.returncode == 0, result.stderr
    assert next(iter(outcomes)) == 'device'
    assert outcomes['tests_deform_attn'].startswith('passed')
    assert outcomes['deform_attn_peers'].startswith('passed')
    order = [name for name in outcomes if name.startswith(('tests', 'deform_attn_p'))]
    assert order == ['tests_deform_attn', 'deform_attn_peers', 'tests_others']
    tests = [call for call in calls if '-m pytest' in call]
    assert len(tests) == 2 and all(
        ' -n ' in call and ' -x' not in call for call in tests
    )
    with tarfile.open(f'{check.out}.tar.gz') as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert {'summary.txt', 'failed_tests.txt', 'tests_others.log'} <= names


def test_every_cuda_test_of_the_ops_is_run_once(check):
    _, _, calls = check()
    run = [
        word
        for call in calls
        if '-m pytest' in call
        for word in call.split()
        if word.endswith('.py')
    ]
    marked = [
        str(path.relative_to(ROOT))
        for path in (ROOT / 'tests/test_ops').rglob('test_*.py')
        if 'mark.cuda' in path.read_text()
    ]
    assert marked and sorted(run) == sorted(marked)


def test_without_xdist_tests_run_in_one_process(check):
    _, _, calls = check(XDIST=1)
    assert not any(' -n ' in call for call in calls if '-m pytest' in call)


def test_failing_tests_are_listed_and_do_not_stop_the_suites(check):
    result, outcomes, _ = check(TESTS=1)
    assert result.returncode == 1
    assert outcomes['tests_others'].startswith('FAILED (exit code 1)')
    assert outcomes['neighborhood_attn'].startswith('passed')
    assert (check.out / 'failed_tests.txt').read_text().count('test_y') == 2
    assert '2 steps failed' in result.stderr


def test_a_suite_that_fails_does_not_stop_the_others(check):
    result, outcomes, _ = check(SUITES=1)
    assert result.returncode == 1
    failed = [name for name, text in outcomes.items() if text.startswith('FAILED')]
    assert {'deform_attn_peers', 'deform_sdpa_bf16', 'deform_attn'} <= set(failed)


def test_without_a_gpu_nothing_is_run(check):
    result, outcomes, calls = check(DEVICE=1)
    assert result.returncode == 1
    assert list(outcomes) == ['device'] and len(calls) == 1


def test_slow_tests_are_stopped_and_the_suites_measured(check):
    result, outcomes, _ = check(SLEEP=60, TESTS_S=1)
    assert result.returncode == 1
    assert outcomes['tests_others'].startswith('FAILED (more than 1s)')
    assert outcomes['deform_attn'].startswith('passed')


def test_what_has_no_time_left_is_said(check):
    result, outcomes, _ = check(BUDGET_S=5)
    assert result.returncode == 1
    assert set(outcomes.values()) == {'skipped, no time left'}


def test_list_runs_nothing(check):
    result, outcomes, calls = check('--list')
    assert result.returncode == 0 and not outcomes
    assert all('import xdist' in call for call in calls)
    assert 'tools/benchmark.py op deform_attn' in result.stdout
    assert 'compute-sanitizer --tool racecheck' in result.stdout
    assert not check.out.exists()
