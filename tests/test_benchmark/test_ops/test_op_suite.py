import json
import os
import subprocess
import sys

import pytest
import torch

from deform_gqa.benchmark.core.errors import GateError
from deform_gqa.benchmark.core.report import Report
from deform_gqa.benchmark.ops import suite

TINY = ['--sizes', '32x64', '--stages', '1', '--device', 'cpu']
TINY += ['--maps', '5x6', '--heads', '4', '--views', '2', '--points', '3']
TINY += ['--repeats', '2', '--min-time-s', '0.01']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('deform_attention', "unknown 'deform_attention'; there are deform_attn, "),
        ('--backends cuda', "--backends: unknown 'cuda'; there are naive, torch"),
        ('--sizes 800', "--sizes: takes HEIGHTxWIDTH of 1 to 16384 pixels, got '800'"),
        ('--sizes 0x8', "got '0x8'"),
        ('--sizes 8x99999', "got '8x99999'"),
        ('--stages 5', "--stages: unknown '5'; there are 1, 2, 3, 4"),
        ('neighborhood_attn --stages 4', 'neighborhood_attn has no case'),
        ('--batch-sizes 0', '--batch-sizes: must be positive, got 0'),
        (
            '--kv-heads two',
            "--kv-heads: unknown 'two'; there are full, half, one, sweep",
        ),
        ('--maps 18', "--maps: takes HEIGHTxWIDTH of 1 to 16384 pixels, got '18'"),
        ('--views 0', '--views: must be positive, got 0'),
        ('--points -4', '--points: must be positive, got -4'),
        ('--heads 0', '--heads: must be positive, got 0'),
        ('--directions backward', "--directions: unknown 'backward'"),
        ('--dtype fp8', "--dtype: unknown 'fp8'; there are fp32, fp16, bf16"),
        ('--device tpu', "--device: must be 'cpu' or 'cuda[:N]', got 'tpu'"),
        ('--device cuda:99', '--device cuda:99: torch sees'),
        ('--threads 0', '--threads: must be positive, got 0'),
        ('--threads x', "--threads: invalid int value: 'x'"),
        ('--thread_count', 'unrecognized arguments: --thread_count'),
        ('--repeats -1', '--repeats: must be positive, got -1'),
        ('--min-time-s 0', '--min-time-s: must be positive, got 0.0'),
        ('--min-time-s nan', '--min-time-s: must be positive, got nan'),
        ('--out setup.cfg', "--out: 'setup.cfg' cannot be a folder: setup.cfg is a"),
        ('--out setup.cfg/a', "--out: 'setup.cfg/a' cannot be a folder: setup.cfg is"),
    ],
)
def test_wrong_options(benchmark_tool, capsys, options, message):
    assert benchmark_tool.main(['op', *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('benchmark.py op: error: ')
    assert message in err
    assert err.count('\n') == 1


def test_folder_without_permission(benchmark_tool, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(os, 'access', lambda path, mode: path != tmp_path)
    assert benchmark_tool.main(['op', '--out', str(tmp_path / 'a' / 'b')]) == 2
    assert f'cannot be written: no permission in {tmp_path}' in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_unknown_suite(benchmark_tool, capsys):
    with pytest.raises(SystemExit) as exit_info:
        benchmark_tool.main(['ops'])
    assert exit_info.value.code == 2
    assert "invalid choice: 'ops'" in capsys.readouterr().err


def test_tiny_run(benchmark_tool, capsys, tmp_path):
    pytest.importorskip('matplotlib')
    out_dir = tmp_path / 'results'
    argv = ['op', *TINY, '--backends', 'naive', 'torch', 'flex', '--out', str(out_dir)]
    assert benchmark_tool.main(argv) == 0
    assert capsys.readouterr().out.startswith('# Ops: ')
    names = ['deform_attn.png', 'deform_sdpa.png', 'ms_deform_attn.png']
    names += ['neighborhood_attn.png', 'op.json', 'op.md']
    assert sorted(path.name for path in out_dir.iterdir()) == names
    report = Report.load(out_dir / 'op.json')
    assert report.command.startswith('python tools/benchmark.py op --sizes 32x64')
    assert report.environment['torch'] == torch.__version__
    assert report.options['sizes'] == [[32, 64]]
    cases = 3 + 3  # of ms_deform_attn, and one of each other op
    assert len(report.rows) == cases * 2 * 3  # directions, backends
    for row in report.rows:
        if row.backend == 'flex':
            assert (row.status, row.timing) == ('unsupported', None)
        else:
            assert row.status == 'ok'
            assert len(row.timing.samples_ms) == 2
            assert row.work['pairs'] > 0


def test_time_limit_skips_the_rest(benchmark_tool, capsys, tmp_path):
    argv = ['op', 'deform_attn', *TINY, '--backends', 'naive', '--time-limit-s', '1e-9']
    assert benchmark_tool.main([*argv, '--out', str(tmp_path)]) == 0
    record = json.loads((tmp_path / 'op.json').read_text())
    assert {row['status'] for row in record['rows']} == {'skipped'}
    assert 'skipped: the time limit was reached' in capsys.readouterr().out


def test_gate_only(benchmark_tool, capsys):
    argv = ['op', *TINY, '--backends', 'torch', '--gate-only']
    assert benchmark_tool.main(argv) == 0
    assert capsys.readouterr().out == '6 comparisons with naive passed\n'


def test_gate_only_takes_no_unchecked_backend(benchmark_tool, capsys):
    argv = ['op', 'deform_attn', *TINY, '--backends', 'torch', 'flex', '--gate-only']
    assert benchmark_tool.main(argv) == 1
    assert 'flex on deform_attn/32x64/stage1' in capsys.readouterr().err


def test_a_red_gate_reports_nothing(benchmark_tool, capsys, monkeypatch, tmp_path):
    def check(self, case, backend):
        raise GateError(f'{backend} is wrong')

    monkeypatch.setattr(suite.Gate, 'check', check)
    argv = ['op', *TINY, '--backends', 'torch', '--out', str(tmp_path)]
    assert benchmark_tool.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ''
    assert err.splitlines()[-1] == ('benchmark.py op: nothing reported: torch is wrong')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('backend', 'error', 'ends'),
    [
        ('torch', torch.OutOfMemoryError('CUDA out of memory\nmore'), False),
        ('sdpa-bias', NotImplementedError('not for this shape'), False),
        ('torch', RuntimeError('a defect'), True),
    ],
)
def test_failures(monkeypatch, benchmark_tool, capsys, backend, error, ends):
    """Baselines may fail and memory may run out; a defect of ours ends the run."""

    def check(self, case, backend):
        raise error

    monkeypatch.setattr(suite.Gate, 'check', check)
    argv = ['op', 'deform_attn', *TINY, '--backends', backend]
    if ends:
        with pytest.raises(RuntimeError, match='a defect'):
            benchmark_tool.main(argv)
        return
    assert benchmark_tool.main(argv) == 0
    text = f'- {backend} failed: {type(error).__name__}: {str(error).splitlines()[0]} ('
    assert text in capsys.readouterr().out


def test_needs_no_mm_package():
    """The op suite runs on a machine with torch alone."""
    code = (
        'import sys, torch\n'
        'import deform_gqa.benchmark.ops.suite\n'
        "names = {'mmengine', 'mmcv', 'mmdet', 'matplotlib', 'rich'}\n"
        'found = names & set(sys.modules)\n'
        'sys.exit(str(found) if found else 0)\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


def test_progress_without_rich(monkeypatch, capsys):
    from deform_gqa.benchmark.core import progress

    monkeypatch.setattr(progress.importlib.util, 'find_spec', lambda name: None)
    with progress.progress(2) as step:
        step('one')
        step('two')
    assert capsys.readouterr().err == '[1/2] one\n[2/2] two\n'
