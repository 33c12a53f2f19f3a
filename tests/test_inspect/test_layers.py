"""What the D layers launch, and the reports on it."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET') == '1':
    pytest.skip('interpreted kernels do not compile', allow_module_level=True)

from deform_gqa.inspect import aot, layer_table, layers


def test_fourteen_layers_as_in_detection():
    found = layers.layers((800, 1333))
    assert [x.count for x in found] == [1, 2, 9, 2]
    assert {x.grid for x in found} == {(25, 42)}
    assert [x.map_size for x in found] == [(200, 334), (100, 167), (50, 84), (25, 42)]
    assert [x.table_size for x in found] == [111, 55, 27, 13]
    assert {x.head_dim for x in found} == {32}


def test_rows_of_keys_are_contiguous():
    stage = layers.layers((224, 224))[2]
    forward, *_ = layers.launches(stage, 90, torch.bfloat16)
    x = forward.arguments
    channels = stage.heads * stage.head_dim
    assert (x['k_h'], x['k_s'], x['k_d']) == (stage.head_dim, channels, 1)
    assert (x['q_h'], x['q_n'], x['q_d']) == (stage.head_dim, channels, 1)


def test_iterations():
    stage = layers.layers((800, 1333))[0]
    for launch in layers.launches(stage, 90, torch.bfloat16):
        x = launch.arguments
        if layers.pass_name(launch) in ('fwd', 'dq'):
            assert layers.iterations(launch) == -(-1050 // x['BN'])
        else:
            patches = -(-200 // x['R']) * -(-334 // x['C'])
            assert layers.iterations(launch) == -(-patches // x['num_splits'])


def test_separate_gradient_of_the_bias_has_its_own_name():
    stage = layers.layers((224, 224))[0]
    found = layers.launches(stage, 90, torch.bfloat16)
    assert [layers.pass_name(x) for x in found] == ['fwd', 'dq', 'dkdv', 'dbias']


def test_report_of_forward():
    stage = layers.layers((800, 1333))[3]
    forward, *_ = layers.launches(stage, 90, torch.bfloat16)
    report = layers.report(forward, 90)
    assert report.spill_bytes == 0
    assert report.programs == forward.grid[0]
    # An exp a pair, at 16 a clock.
    assert 1000 / 16 < report.clocks['MUFU'] < 300
    assert report.clocks['issue'] == pytest.approx(report.instructions * 1000 / 128)
    pairs = BATCHED_PAIRS / pipes_per_us(report)
    assert report.bound_us > pairs


# Of stage 4, all heads.
BATCHED_PAIRS = 2 * 16 * 1050 * 1050


def pipes_per_us(report) -> float:
    """Pairs that the GPU works on in a microsecond, by the clocks of a tile."""
    return 132 * 1755 * 1000 / report.clocks[report.binds]


@pytest.mark.parametrize('name', ['fwd', 'dq'])
def test_bias_hardly_takes_shared_memory(name):
    """Operands of its product are made where that reads them: no barrier, no detour."""
    stage = layers.layers((800, 1333))[0]
    found = layers.launches(stage, 90, torch.bfloat16)
    launch = next(x for x in found if layers.pass_name(x) == name)
    report = layers.report(launch, 90)
    assert report.spill_bytes == 0 and not report.serialised, report
    assert report.warps_at_once >= 16, report
    assert report.barriers <= 6, report
    assert report.clocks['shared'] < 80, report
    assert report.clocks[report.binds] < 130, report


def test_weights_stay_in_the_warp_that_made_them():
    """Where a patch reaches few rows of the table: S^T is an operand as it is."""
    stage = layers.layers((800, 1333))[0]
    found = layers.launches(stage, 90, torch.bfloat16)
    launch = next(x for x in found if layers.pass_name(x) == 'dkdv')
    assert launch.name == 'deform_attn_dkdv_dbias_kernel'
    report = layers.report(launch, 90)
    assert report.spill_bytes == 0, report
    assert report.clocks[report.binds] < 450, report


def test_serialised_products_are_what_ptxas_warns_of(monkeypatch):
    stage = layers.layers((800, 1333))[3]
    forward, *_ = layers.launches(stage, 90, torch.bfloat16)
    kernel = aot.compile_launch(forward, 90)
    assert all('wgmma' in line for line in aot.serialised_products(kernel, 90))
    log = 'ptxas info : (C7515) Potential Performance Loss: wgmma.mma_async ' + (
        'instructions are serialized due to x\nptxas info : Used 90 registers\n'
    )
    done = subprocess.CompletedProcess([], 0, '', log)
    monkeypatch.setattr(subprocess, 'run', lambda *args, **kwargs: done)
    assert len(aot.serialised_products(kernel, 90)) == 1


@pytest.fixture
def one_report(monkeypatch):
    """Reports on a launch that is not compiled."""
    report = layers.LaunchReport(
        name='fwd',
        head_dim=32,
        tile='16x16x64',
        registers=126,
        spill_bytes=0,
        shared_bytes=65536,
        warps_at_once=16,
        barriers=11,
        serialised=False,
        programs=336,
        waves=2.5,
        instructions=17.25,
        clocks=dict(issue=135.0, shared=137.0, ALU=100, MUFU=90, FMA=50, tensor=20),
        bound_us=100.0,
        binds='shared',
    )
    monkeypatch.setattr(
        layer_table,
        'reports',
        lambda image, *args: [(x, report) for x in layers.layers(image)],
    )
    return report


def test_table(one_report, capsys):
    entries = layer_table.print_layers([90], [32], [torch.bfloat16])
    text = capsys.readouterr().out
    assert '132 SMs at 1.755 GHz' in text
    assert text.count('bound of all 14 layers in us: fwd 1400') == 2
    assert len(entries) == 8
    assert entries['800x1333/stage 3/D 32/bfloat16/sm_90/fwd']['registers'] == 126


def test_comparison_fails_where_a_kernel_got_worse(one_report, tmp_path, capsys):
    entries = layer_table.print_layers([90], [32], [torch.bfloat16])
    before, after, other = (tmp_path / name for name in 'abc')
    layer_table.save(entries, before)
    layer_table.save(entries, after)
    assert run_compare(before, after) == 0
    worse = json.loads(after.read_text())
    key = '224x224/stage 2/D 32/bfloat16/sm_90/fwd'
    worse[key]['instructions'] = 17.5
    layer_table.save(worse, after)
    assert layer_table.worsened(before, after) == [f'{key}: instructions 17.25 -> 17.5']
    assert layer_table.worsened(after, before) == []
    assert run_compare(before, after) == 1
    del worse[key]
    layer_table.save(worse, other)
    with pytest.raises(ValueError, match=r'different kernels.*stage 2'):
        layer_table.worsened(before, other)


def run_compare(*files) -> int:
    command = [sys.executable, 'tools/kernel_report.py', '--compare', *files]
    return subprocess.run(command, capture_output=True).returncode
