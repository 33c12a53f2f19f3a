import json

import pytest
from op_reports import make_report, make_sdpa_report

from deform_gqa.benchmark.core import figures
from deform_gqa.benchmark.core.report import Report
from deform_gqa.benchmark.core.writer import publish
from deform_gqa.benchmark.ops import report as op_report

PNG = b'\x89PNG'


def test_json_round_trip(tmp_path):
    report = make_report(rooflines=True)
    publish('op', report.to_json(), '', str(tmp_path / 'new'), {})
    assert Report.load(tmp_path / 'new' / 'op.json') == report
    record = json.loads((tmp_path / 'new' / 'op.json').read_text())
    row = record['rows'][0]
    assert row['samples_ms'] == [0.9, 1.0, 1.1]
    assert row['median_ms'] == 1.0
    assert row['floor_us'] == {'exp': 500.0, 'tensor': 100.0, 'memory': 50.0}
    assert record['rows'][2]['reason'] == 'no GPU'
    assert 'samples_ms' not in record['rows'][2]


def test_a_picture_that_fails_leaves_the_files_of_before(tmp_path):
    pytest.importorskip('matplotlib')

    def fail():
        raise RuntimeError('no picture')

    publish('op', {}, 'old', str(tmp_path), {})
    with pytest.raises(RuntimeError, match='no picture'):
        publish('op', {'new': True}, 'new', str(tmp_path), {'a': fail})
    assert sorted(path.name for path in tmp_path.iterdir()) == ['op.json', 'op.md']
    assert (tmp_path / 'op.md').read_text() == 'old'


def test_other_formats_are_refused(tmp_path):
    (tmp_path / 'x.json').write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match='format version 99, expected 1'):
        Report.load(tmp_path / 'x.json')


def test_markdown():
    text = op_report.op_markdown(make_report())
    assert '# Ops: a device, fp32, 1 thread' in text
    assert 'torch 2.0, python 3.11, deform_gqa 0.1, commit abc, date today. ' in text
    line = (
        '| 3 | 800x1333 | 2 | 8 of 8 | 4200 x 1050 | forward | torch '
        '| 1.50 | 1.41 - 1.59 | 2.00x | 50.0 | 2.00x |'
    )
    assert line in text
    assert '- triton unsupported: no GPU (8 cases)' in text
    assert 'roofline' not in text.split('All deform_attn layers')[0]


def test_rooflines_in_markdown():
    text = op_report.op_markdown(make_report(rooflines=True))
    assert 'time / roofline' in text
    assert '| torch | 1.50 | 1.41 - 1.59 | 2.00x | 50.0 | 2.00x | 3.00x |' in text
    assert '| 500 | 100 | 50.0 |' in text


def test_totals_need_every_stage():
    found = {
        (x['kv_heads'], x['direction'], x['backend']): x
        for x in op_report.totals(make_report(rooflines=True), 'deform_attn')
    }
    naive = found['full', 'forward', 'naive']
    assert naive['layers'] == 14
    assert naive['ms'] == pytest.approx(1 * 1 + 2 * 2 + 9 * 3 + 2 * 4)
    assert naive['roofline_ms'] == pytest.approx(14 * 0.5)
    assert found['one', 'forward', 'torch']['ms'] == pytest.approx(20)
    assert not any(backend == 'triton' for *_, backend in found)
    partial = make_report(stages=(1, 2))
    assert op_report.totals(partial, 'deform_attn') == []
    assert op_report.totals_table(partial, 'deform_attn') is None
    [*_, last] = op_report.totals(make_report(stages=(1, 2, 3)), 'neighborhood_attn')
    assert last['layers'] == 12


def test_pictures(tmp_path):
    pytest.importorskip('matplotlib')
    report = make_report(rooflines=True, stages=(1, 2))
    pictures = op_report.op_pictures(report)
    publish('op', report.to_json(), '', str(tmp_path), pictures)
    paths = sorted(tmp_path.glob('*.png'))
    assert [path.name for path in paths] == ['deform_attn.png', 'neighborhood_attn.png']
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_picture_texts():
    pytest.importorskip('matplotlib')
    figure = op_report.op_figure(make_report(rooflines=True), 'deform_attn')
    assert figure.get_suptitle() == (
        'deform_attn: 800x1333 px, batch 2\na device, fp32, 1 thread'
    )
    time, memory, *_ = figure.axes
    assert time.get_xlabel() == 'ms a call (median, p20 to p80)'
    assert memory.get_xlabel() == 'MiB at the peak'
    labels = [text.get_text() for text in time.get_yticklabels()]
    wanted = ['forward', 'stage 1, all kv heads', 'stage 1, 1 of 2 kv heads']
    assert labels[:3] == wanted
    assert 'forward+backward' in labels
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == sorted(['naive', 'torch', figures.ROOFLINE_LABEL])


def test_deform_sdpa_tables():
    text = op_report.op_markdown(make_sdpa_report())
    assert '| map | views | points | batch | kv heads | queries x keys |' in text
    line = (
        '| 14x18 | 2 | 12 | 2 | 1 of 8 | 504 x 24 | forward | torch '
        '| 1.00 | 1.00 - 1.00 | 1.00x | 20.0 | 6.00x | 2.00x |'
    )
    assert line in text
    assert '| GFLOP | MB moved | M samples | MB gathered | exp us |' in text
    assert 'DAT-T++' not in text


def test_deform_sdpa_picture():
    pytest.importorskip('matplotlib')
    figure = op_report.op_figure(make_sdpa_report(), 'deform_sdpa')
    title = figure.get_suptitle().splitlines()[0]
    assert title == 'deform_sdpa: 14x18, 2 views, batch 2, 1 of 8 kv heads'
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ['2 points', '12 points']


def test_nothing_measured_has_no_picture():
    report = make_report(stages=(1,))
    report.rows[:] = [row for row in report.rows if row.status != 'ok']
    assert op_report.op_pictures(report) == {}
    with pytest.raises(ValueError, match='nothing was measured of deform_attn'):
        op_report.op_figure(report, 'deform_attn')
