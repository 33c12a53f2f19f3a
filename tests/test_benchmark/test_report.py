import dataclasses
import json

import pytest
import torch

from deform_gqa.benchmark import panels, plots, tables
from deform_gqa.benchmark.floors import DIRECTIONS, count_work
from deform_gqa.benchmark.op_cases import CASES, select_cases
from deform_gqa.benchmark.report import Report, Row
from deform_gqa.benchmark.sdpa_cases import SdpaSweep, sdpa_cases
from deform_gqa.profiling.timing import Timing

PNG = b'\x89PNG'
FLOORS_US = {'exp': 500.0, 'tensor': 100.0, 'memory': 50.0}


def make_rows(case, floors):
    """naive takes stage milliseconds, torch half of it; triton is unsupported."""
    for direction in DIRECTIONS:
        common = dict(
            case=case.name,
            direction=direction,
            work=dict(pairs=10**6, exps=10**6, flops=10**9, bytes=10**6),
            floor_us=FLOORS_US if floors else None,
        )
        for backend, factor in (('naive', 1.0), ('torch', 0.5)):
            ms = case.stage * factor
            yield Row(
                **common,
                backend=backend,
                timing=Timing((ms * 0.9, ms, ms * 1.1)),
                peak_memory_mib=100.0 * factor,
            )
        yield Row(**common, backend='triton', status='unsupported', reason='no GPU')


def make_report(floors=False, stages=(1, 2, 3, 4)):
    cases = select_cases(CASES, [(800, 1333)], stages, [2], ['full', 'one'])
    return Report(
        suite='op',
        command='python tools/benchmark.py op',
        environment=dict(
            device='a device',
            device_type='cpu',
            threads=1,
            cpu_count=2,
            load_average=0.1,
            torch='2.0',
            triton=None,
            cuda=None,
            python='3.11',
            deform_gqa='0.1',
            commit='abc',
            date='today',
        ),
        options=dict(
            dtype='fp32',
            directions=list(DIRECTIONS),
            backends=['naive', 'torch', 'triton'],
        ),
        cases=[json.loads(json.dumps(case.describe())) for case in cases],
        rows=[row for case in cases for row in make_rows(case, floors)],
    )


def test_json_round_trip(tmp_path):
    report = make_report(floors=True)
    report.save(tmp_path / 'new' / 'op.json')
    assert Report.load(tmp_path / 'new' / 'op.json') == report
    record = json.loads((tmp_path / 'new' / 'op.json').read_text())
    row = record['rows'][0]
    assert row['samples_ms'] == [0.9, 1.0, 1.1]
    assert row['median_ms'] == 1.0
    assert record['rows'][2]['reason'] == 'no GPU'
    assert 'samples_ms' not in record['rows'][2]


def test_other_formats_are_refused(tmp_path):
    (tmp_path / 'x.json').write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match='format version 99, expected 1'):
        Report.load(tmp_path / 'x.json')


def test_markdown():
    text = tables.op_markdown(make_report())
    assert '# Ops: a device, fp32, 1 thread' in text
    assert 'torch 2.0, python 3.11, deform_gqa 0.1, commit abc, date today. ' in text
    line = (
        '| 3 | 800x1333 | 2 | 8 of 8 | 4200 x 1050 | forward | torch '
        '| 1.50 | 1.41 - 1.59 | 2.00x | 50.0 | 2.00x |'
    )
    assert line in text
    assert '- triton unsupported: no GPU (8 cases)' in text
    assert 'floor' not in text.split('All deform_attn layers')[0]


def test_floors_in_markdown():
    text = tables.op_markdown(make_report(floors=True))
    assert 'time / floor' in text
    assert '| torch | 1.50 | 1.41 - 1.59 | 2.00x | 50.0 | 2.00x | 3.00x |' in text
    assert '| 500 | 100 | 50.0 |' in text


def test_totals_need_every_stage():
    found = {
        (x['kv_heads'], x['direction'], x['backend']): x
        for x in tables.totals(make_report(floors=True), 'deform_attn')
    }
    naive = found['full', 'forward', 'naive']
    assert naive['layers'] == 14
    assert naive['ms'] == pytest.approx(1 * 1 + 2 * 2 + 9 * 3 + 2 * 4)
    assert naive['floor_ms'] == pytest.approx(14 * 0.5)
    assert found['one', 'forward', 'torch']['ms'] == pytest.approx(20)
    assert not any(backend == 'triton' for *_, backend in found)
    partial = make_report(stages=(1, 2))
    assert tables.totals(partial, 'deform_attn') == []
    assert tables.totals_table(partial, 'deform_attn') is None
    [*_, last] = tables.totals(make_report(stages=(1, 2, 3)), 'neighborhood_attn')
    assert last['layers'] == 12


def test_pictures(tmp_path):
    pytest.importorskip('matplotlib')
    paths = plots.save_op_figures(make_report(floors=True, stages=(1, 2)), tmp_path)
    assert [path.name for path in paths] == ['deform_attn.png', 'neighborhood_attn.png']
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_picture_texts():
    pytest.importorskip('matplotlib')
    figure = plots.op_figure(make_report(floors=True), 'deform_attn')
    assert figure.get_suptitle() == (
        'deform_attn: 800x1333 px, batch 2\na device, fp32, 1 thread'
    )
    time, memory, *_ = figure.axes
    assert time.get_xlabel() == 'ms a call (median, p20 to p80)'
    assert memory.get_xlabel() == 'MiB at the peak'
    labels = [text.get_text() for text in time.get_yticklabels()]
    assert labels[:2] == ['stage 1, all kv heads', 'stage 1, 1 of 2 kv heads']
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == sorted(['naive', 'torch', panels.FLOOR_LABEL])


def make_sdpa_report():
    """Two cases; naive grows with the points, torch does not."""
    report = make_report(floors=True, stages=(1,))
    sweep = SdpaSweep(((14, 18),), heads=(8,), views=(2,), points=(2, 12))
    cases = sdpa_cases(sweep, ['one'])
    report.cases[:] = [json.loads(json.dumps(case.describe())) for case in cases]
    work = dataclasses.asdict(count_work(cases[0], torch.float32, 'forward'))
    report.rows[:] = [
        Row(
            case=case.name,
            backend=backend,
            direction='forward',
            work=work,
            floor_us=FLOORS_US,
            timing=Timing((1.0,)),
            peak_memory_mib=mib,
        )
        for case in cases
        for backend, mib in (('naive', case.points * 10.0), ('torch', 20.0))
    ]
    return report


def test_deform_sdpa_tables():
    text = tables.op_markdown(make_sdpa_report())
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
    figure = plots.op_figure(make_sdpa_report(), 'deform_sdpa')
    title = figure.get_suptitle().splitlines()[0]
    assert title == 'deform_sdpa: 14x18, batch 2, 1 of 8 kv heads, 2 views'
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ['2 points', '12 points']


def test_nothing_measured_has_no_picture(tmp_path):
    report = make_report(stages=(1,))
    report.rows[:] = [row for row in report.rows if row.status != 'ok']
    assert plots.save_op_figures(report, tmp_path) == []
    with pytest.raises(ValueError, match='nothing was measured of deform_attn'):
        plots.op_figure(report, 'deform_attn')
