import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from op_reports import make_report

from deform_gqa.benchmark import compare as comparison
from deform_gqa.profiling.timing import Timing


def make_pair(tmp_path, factor=1.0, spread=0.01, samples=20):
    """Two reports with random times; all of the second are ``factor`` longer."""
    paths = []
    for name, scale in (('before', 1.0), ('after', factor)):
        report, generator = make_report(stages=(1, 2)), random.Random(name)
        report.rows[:] = [
            row
            if row.timing is None
            else dataclasses.replace(
                row,
                timing=Timing(
                    tuple(
                        row.timing.median_ms * scale * generator.gauss(1, spread)
                        for _ in range(samples)
                    )
                ),
            )
            for row in report.rows
        ]
        paths.append(tmp_path / f'{name}.json')
        paths[-1].write_text(json.dumps(report.to_json()))
    return [str(path) for path in paths]


@pytest.mark.parametrize(
    ('factor', 'spread', 'tolerance', 'code', 'verdict'),
    [
        (1.0, 0.01, 0.05, 0, 'same'),
        (1.5, 0.01, 0.05, 1, 'slower'),
        (0.7, 0.01, 0.05, 0, 'faster'),
        (1.2, 0.01, 0.3, 0, 'same'),
        (1.04, 0.001, 0.0, 1, 'slower'),
        (1.05, 0.2, 0.1, 0, 'same'),  # lost in the noise
    ],
)
def test_exit_code(
    benchmark_tool, tmp_path, capsys, factor, spread, tolerance, code, verdict
):
    pair = make_pair(tmp_path, factor, spread)
    argv = ['compare', *pair, '--tolerance', str(tolerance)]
    assert benchmark_tool.main(argv) == code
    out = capsys.readouterr().out
    assert f'| {verdict} |' in out
    assert 'Before: abc (today); after: abc (today)' in out


def test_files(benchmark_tool, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    pair, out_dir = make_pair(tmp_path, factor=2.0), tmp_path / 'out'
    assert benchmark_tool.main(['compare', *pair, '--out', str(out_dir)]) == 1
    names = sorted(path.name for path in out_dir.iterdir())
    assert names == ['compare.json', 'compare.md', 'compare.png']
    record = json.loads((out_dir / 'compare.json').read_text())
    row = record['rows'][0]
    assert (row['verdict'], row['memory_ratio']) == ('slower', 1.0)
    assert row['low'] < 2 < row['high']
    assert row['ratio'] == pytest.approx(2, rel=0.05)


def test_band_of_few_samples_is_their_range():
    before, after = Timing((1.0, 2.0)), Timing((2.0, 3.0, 4.0))
    assert comparison.noise_band(before, after) == (1.0, 4.0)


def test_band_covers_equal_distributions():
    """Of 95 % intervals about 95 % hold the true ratio."""
    generator = random.Random(0)

    def draw():
        return Timing(tuple(generator.gauss(10, 1) for _ in range(30)))

    bands = [comparison.noise_band(draw(), draw()) for _ in range(60)]
    assert sum(low <= 1 <= high for low, high in bands) >= 52
    wide = comparison.noise_band(before := draw(), after := draw(), rows=100)
    narrow = comparison.noise_band(before, after)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def change_file(path, change):
    record = json.loads(Path(path).read_text())
    change(record)
    Path(path).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda r: r.update(suite='layer'), 'suite: op before, layer after'),
        (
            lambda r: r['environment'].update(device='other'),
            'device: a device before, other after',
        ),
        (lambda r: r['environment'].update(threads=2), 'threads: 1 before, 2 after'),
        (lambda r: r['options'].update(dtype='bf16'), 'dtype: fp32 before, bf16 after'),
        (lambda r: r['cases'][0].update(batch=7), 'is another than before'),
        (lambda r: r['rows'].pop(0), 'naive forward is missing after'),
    ],
)
def test_unlike_reports_need_force(benchmark_tool, tmp_path, capsys, change, message):
    pair = make_pair(tmp_path)
    change_file(pair[1], change)
    assert benchmark_tool.main(['compare', *pair]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('benchmark.py compare: error: the reports differ: ')
    assert message in err
    assert benchmark_tool.main(['compare', *pair, '--force']) == 0
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'No such file'),
        ('#', 'is no JSON file'),
        ('[]', 'is no report of this tool'),
        ('{}', 'has format version None'),
        ('{"format_version": 1, "suite": "op"}', 'is no report of this tool'),
    ],
)
def test_bad_files(benchmark_tool, tmp_path, capsys, content, message):
    before, _ = make_pair(tmp_path)
    bad = tmp_path / 'bad.json'
    if content is not None:
        bad.write_text(content)
    assert benchmark_tool.main(['compare', before, str(bad)]) == 2
    assert message in capsys.readouterr().err


def test_nothing_in_common(benchmark_tool, tmp_path, capsys):
    pair = make_pair(tmp_path)
    change_file(pair[1], lambda record: record['rows'].clear())
    assert benchmark_tool.main(['compare', *pair, '--force']) == 2
    assert 'no measured row in common' in capsys.readouterr().err


def test_tolerance_is_checked(benchmark_tool, tmp_path, capsys):
    argv = ['compare', *make_pair(tmp_path), '--tolerance', '-1']
    assert benchmark_tool.main(argv) == 2
    assert '--tolerance: must be 0 or more, got -1.0' in capsys.readouterr().err


def test_out_is_checked(benchmark_tool, tmp_path, capsys):
    argv = ['compare', *make_pair(tmp_path), '--out', str(tmp_path / 'after.json')]
    assert benchmark_tool.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert 'after.json is a file' in err


def test_needs_no_other_suite():
    """Reports of a GPU machine are compared where torch is all there is."""
    code = (
        'import sys, deform_gqa.benchmark.compare\n'
        "names = ('deform_gqa.benchmark.ops', 'deform_gqa.benchmark.models', "
        "'mmengine')\n"
        'found = [name for name in sys.modules if name.startswith(names)]\n'
        'sys.exit(str(found) if found else 0)\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


def test_picture_texts(tmp_path):
    pytest.importorskip('matplotlib')
    from deform_gqa.benchmark.compare import compare_figure

    before, after = map(comparison.load_report, make_pair(tmp_path, factor=2.0))
    changes = comparison.compare(before, after, tolerance=0.05)
    figure = compare_figure(before, after, changes, tolerance=0.05)
    assert figure.get_suptitle() == (
        'Change of the suite op: abc to abc\na device, fp32, 1 thread'
    )
    assert 'right is slower' in figure.axes[0].get_xlabel()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == ['slower', 'within the tolerance of 5%']


RESULTS = Path(__file__).parents[2] / 'tools/benchmark_results'
# What no suite with rows has written: one figure, host times, compiled kernels.
NO_REPORTS = ('hook-overhead.json', 'host_time.json', 'layers.json', 'faults.json')
COMMITTED = sorted(
    path for path in RESULTS.rglob('*.json') if path.name not in NO_REPORTS
)


@pytest.mark.parametrize('path', COMMITTED, ids=lambda path: path.parent.name)
def test_committed_reports_still_load(path):
    report = comparison.load_report(str(path))
    assert comparison.differences(report, report) == []
    changes = comparison.compare(report, report, tolerance=0.0)
    assert changes
    assert {change['ratio'] for change in changes} == {1.0}
