import subprocess
import sys

import pytest

from deform_gqa.benchmark.core.kv_curves import kv_figure
from deform_gqa.benchmark.core.report import Report

TINY = ['--device', 'cpu', '--repeats', '2', '--min-time-s', '0.01', '--quick']
DETECTOR = 'configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'


def run(tool, tmp_path, *argv):
    assert tool.main(['gqa-sweep', *argv, *TINY, '--out', str(tmp_path)]) == 0
    return Report.load(tmp_path / 'gqa-sweep.json')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('', 'give a TARGET or --preset, got None, None'),
        ('deform_attn --preset gqa-fig6', 'give a TARGET or --preset, got deform_attn'),
        ('--preset t5', "--preset: unknown 't5'; there are deformable-gqa-paper"),
        ('deform_attn --stage 5', "--stage: unknown '5'"),
        ('neighborhood_attn --stage 4', 'neighborhood_attn has no case at stages [4]'),
        ('deform_attn --kv-heads 3', "divisors of the 8 query heads, got '3'"),
        ('deform_attn --kv-heads half', "divisors of the 8 query heads, got 'half'"),
        ('t++ --kv-heads 32', "divisors of the 16 query heads, got '32'"),
        ('deform_attn --sizes 8x8 9x9', '--sizes takes one value in a sweep'),
        ('deform_sdpa --batch-sizes 1 2', '--batch-sizes takes one value in a sweep'),
        ('deform_sdpa --sizes 8x8', '--sizes has no effect on deform_sdpa'),
        ('deform_attn --cfg-options a=1', '--cfg-options has no effect on deform_attn'),
        ('t++ --stage 1', '--stage has no effect on t++'),
        (f'{DETECTOR} --stage 1', f'--stage has no effect on {DETECTOR}'),
        ('deform_sdpa --stage 1', '--stage has no effect on deform_sdpa'),
        ('--preset gqa-fig6 --stage 3', '--stage has no effect on gqa-fig6'),
        ('t++ --sizes 16x64', '--sizes 16x64: DAT takes images of at least 32x32'),
        ('DepthwiseConv --kv-heads 1', '--kv-heads 1: DepthwiseConv has no kv heads'),
        ('deform_atn', "layer 'deform_atn' is not registered in mmdet.registry"),
        ('no.py', "config file 'no.py' does not exist"),
        (
            'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
            'has no DAT backbone whose kv heads could be set',
        ),
    ],
)
def test_wrong_options(benchmark_tool, capsys, options, message):
    assert benchmark_tool.main(['gqa-sweep', *options.split(), *TINY]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ('target', 'counts'),
    [
        (['deform_attn', '--sizes', '64x64'], [1, 2, 4, 8]),
        (['neighborhood_attn', '--stage', '2', '--sizes', '64x64'], [1, 2, 4]),
        (['--preset', 'gqa-fig6', '--batch-sizes', '1'], [1, 2, 4, 8, 16, 32, 64]),
        (
            ['--preset', 'deformable-gqa-paper', '--batch-sizes', '2'],
            [1, 2, 4, 8, 16, 32],
        ),
        (['MultiheadGQA', '--sizes', '64x64', '--kv-heads', 'sweep'], [1, 2, 4, 8]),
        (['mini', '--sizes', '64x64', '--kv-heads', '1', '16'], [1, 16]),
        ([DETECTOR, '--sizes', '64x64', '--kv-heads', '2', '4'], [2, 4]),
    ],
)
def test_targets(benchmark_tool, tmp_path, target, counts):
    report = run(benchmark_tool, tmp_path, *target)
    assert [case['kv heads'] for case in report.cases] == counts
    assert {row.status for row in report.rows} == {'ok'}
    assert len(report.rows) == len(counts) * len(report.options['directions'])
    assert all(len(row.timing.samples_ms) == 2 for row in report.rows)
    assert all(row.work['flops'] > 0 for row in report.rows)


def test_time_limit(benchmark_tool, tmp_path):
    argv = ['deform_attn', '--sizes', '64x64', '--time-limit-s', '1e-9']
    report = run(benchmark_tool, tmp_path, *argv)
    assert {row.status for row in report.rows} == {'skipped'}


def test_dtype_of_an_op(benchmark_tool, tmp_path):
    argv = ['deform_attn', '--sizes', '64x64', '--amp', 'bf16', '--kv-heads', '1']
    assert run(benchmark_tool, tmp_path, *argv).options['dtype'] == 'bf16'


def test_presets_say_that_they_are_smaller(benchmark_tool, tmp_path, capsys):
    argv = ['--preset', 'deformable-gqa-paper', '--kv-heads', '32']
    report = run(benchmark_tool, tmp_path, *argv)
    assert report.options['subject'] == (
        'DeformableGQA, batch 16 (published: 4096), 512 channels, 4x4 map, '
        '32 heads of 64'
    )
    report = run(benchmark_tool, tmp_path, '--preset', 'gqa-fig6', '--kv-heads', '1')
    assert 'batch 4 (paper: 32), 1 query on 2048 keys' in report.options['subject']


def test_memory_of_an_op_holds_its_arguments(benchmark_tool, tmp_path):
    argv = ['--preset', 'gqa-fig6', '--batch-sizes', '1', '--kv-heads', '64', '1']
    one, full = run(benchmark_tool, tmp_path, *argv).rows
    cache_mib = 2 * 2048 * 64 * 64 * 4 / 2**20
    assert full.peak_memory_mib > cache_mib
    assert one.peak_memory_mib < cache_mib / 8


def test_deform_sdpa_shows_the_saving(benchmark_tool, tmp_path):
    """One sample of a kv head serves its whole group of query heads."""
    argv = ['deform_sdpa', '--kv-heads', '1', '16', '--backends', 'torch']
    argv += ['--repeats', '5', '--threads', '1']
    options = [word for word in TINY if word not in ('--repeats', '2')]
    argv = ['gqa-sweep', *argv, *options, '--out', str(tmp_path)]
    assert benchmark_tool.main(argv) == 0
    report = Report.load(tmp_path / 'gqa-sweep.json')
    one, full = (row for row in report.rows if row.direction == 'forward')
    assert min(one.timing.samples_ms) < 0.6 * min(full.timing.samples_ms)


def test_unsupported_backends_are_listed(benchmark_tool, tmp_path):
    argv = ['deform_attn', '--sizes', '64x64', '--backends', 'torch', 'triton']
    report = run(benchmark_tool, tmp_path, *argv, '--kv-heads', '1')
    statuses = [(row.backend, row.direction, row.status) for row in report.rows]
    assert statuses == [
        ('torch', 'forward', 'ok'),
        ('torch', 'train', 'ok'),
        ('triton', 'forward', 'unsupported'),
        ('triton', 'train', 'unsupported'),
    ]
    text = (tmp_path / 'gqa-sweep.md').read_text()
    assert '- triton unsupported: Triton kernels run on CUDA devices' in text


def test_an_op_without_backends(benchmark_tool, tmp_path):
    argv = ['scaled_dot_product_gqa', '--backends', 'torch', '--kv-heads', '1']
    report = run(benchmark_tool, tmp_path, *argv, '--batch-sizes', '1')
    reasons = {(row.status, row.reason) for row in report.rows}
    [(status, reason)] = reasons
    assert status == 'unsupported'
    assert reason.endswith('runs torch SDPA and has no backends')


def test_picture_texts(benchmark_tool, tmp_path):
    pytest.importorskip('matplotlib')
    argv = ['deform_attn', '--sizes', '64x64', '--backends', 'naive', 'torch']
    report = run(benchmark_tool, tmp_path, *argv, '--threads', '1')
    figure = kv_figure(report)
    device = report.environment['device']
    assert figure.get_suptitle() == (
        'deform_attn, stage 3 of DAT-T++, 64x64 px, batch 1, 8 query heads of 32\n'
        f'{device}, fp32, 1 thread'
    )
    time, memory, *_ = figure.axes
    assert time.get_xlabel() == 'kv heads (of 8 query heads)'
    assert time.get_ylabel() == 'ms a call (median, p20 to p80)'
    assert memory.get_ylabel() == 'MiB at the peak'
    assert [text.get_text() for text in time.get_xticklabels()] == ['1', '2', '4', '8']
    assert time.get_ylim()[0] == 0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *('GQA, naive', 'MHA, naive', 'MQA, naive'),
        *('GQA, torch', 'MHA, torch', 'MQA, torch'),
    ]


def test_ops_need_no_mm_package():
    code = (
        'import argparse, sys\n'
        'from deform_gqa.benchmark import gqa_sweep as suite\n'
        'parser = argparse.ArgumentParser()\n'
        'suite.add_arguments(parser)\n'
        "args = parser.parse_args('deform_attn --quick --sizes 32x32 --repeats 1 '\n"
        "    '--kv-heads 1 --min-time-s 0.01 --device cpu'.split())\n"
        "suite.run(args, '')\n"
        "found = {'mmengine', 'mmcv', 'mmdet'} & set(sys.modules)\n"
        'sys.exit(str(found) if found else 0)\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
