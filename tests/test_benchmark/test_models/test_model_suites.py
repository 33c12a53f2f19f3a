import pytest
import torch
from torch import nn

from deform_gqa.benchmark.core.cases import PLAIN
from deform_gqa.benchmark.core.errors import GateError
from deform_gqa.benchmark.core.report import Report
from deform_gqa.benchmark.models import workload
from deform_gqa.benchmark.models.layer import OTHERS
from deform_gqa.benchmark.models.report import model_figure

TINY = ['--device', 'cpu', '--sizes', '64x96', '--repeats', '2', '--min-time-s', '0.01']
DETECTOR = 'configs/quickstart/retinanet_dat-gqa-mini_fpn_shapes.py'


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        (
            'layer GroupAttention',
            "layer 'GroupAttention' is not registered in mmdet.registry",
        ),
        ('layer --stages 5', "--stages: unknown '5'; there are 1, 2, 3, 4"),
        ('layer --arch x', "--arch: unknown 'x'; there are t, s, b, t++, s++, b++"),
        (
            'layer DeformableGQA --cfg-options window=7',
            "--cfg-options: DeformableGQA takes no option 'window'",
        ),
        (
            'layer DeformableGQA --cfg-options stride=0',
            'DeformableGQA cannot be built: ',
        ),
        ('layer FPN --kv-heads 1', '--kv-heads 1: FPN has no kv heads'),
        (
            'layer DepthwiseConv --kv-heads one',
            '--kv-heads one: DepthwiseConv has no kv heads',
        ),
        (
            'layer --kv-heads two',
            '--kv-heads: takes config, full, half, one, sweep or a number',
        ),
        ('backbone --amp fp8', "--amp: unknown 'fp8'; there are fp16, bf16"),
        ('backbone --batch-sizes 0', '--batch-sizes: must be positive, got 0'),
        ('backbone --directions up', "--directions: unknown 'up'; there are forward"),
        ('backbone --backends cuda', "--backends: unknown 'cuda'; there are auto"),
        ('backbone --checkpoint x.pth', "--checkpoint 'x.pth' does not exist"),
        ('backbone t+++', "backbone 't+++' is no config, no type registered"),
        ('backbone no.py', "config file 'no.py' does not exist"),
        ('backbone mmdet::no.py', "config file 'mmdet::no.py' does not exist"),
        ('backbone t++ --cfg-options arm=1', 'DAT cannot be built: '),
        ('backbone ResNet --kv-heads 1', '--kv-heads 1: the model has no DAT backbone'),
        (
            'backbone configs/_base_/default_runtime.py',
            'has no model.backbone',
        ),
    ],
)
def test_wrong_options(benchmark_tool, capsys, command, message):
    assert benchmark_tool.main([*command.split(), *TINY]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith(
        f'benchmark.py {command.split()[0]}: error: '
    )


@pytest.mark.parametrize('target', ['t++', DETECTOR])
def test_images_too_small_for_dat(benchmark_tool, capsys, target):
    argv = ['backbone', target, *TINY, '--sizes', '64x64', '16x64']
    assert benchmark_tool.main(argv) == 2
    message = '--sizes 16x64: DAT takes images of at least 32x32 pixels'
    assert message in capsys.readouterr().err


def run(tool, tmp_path, *argv):
    assert tool.main([*argv, *TINY, '--out', str(tmp_path)]) == 0
    [path] = tmp_path.glob('*.json')
    assert path.with_suffix('.md').read_text().startswith('# ')
    return Report.load(path)


def test_layer(benchmark_tool, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    argv = ['layer', '--stages', '3', '--backends', 'naive', 'torch', 'triton']
    report = run(benchmark_tool, tmp_path, *argv, '--kv-heads', 'full', '1')
    assert len(report.cases) == 2 * 2  # layers, kv heads
    status = {(row.backend, row.status) for row in report.rows}
    assert status == {('naive', 'ok'), ('torch', 'ok'), ('triton', 'unsupported')}
    flops = {}
    for row in report.rows:
        if row.status == 'ok':
            assert len(row.timing.samples_ms) == 2
            flops.setdefault((row.case, row.direction), set()).add(row.work['flops'])
    assert all(len(counts) == 1 for counts in flops.values())
    text = (tmp_path / 'layer.md').read_text()
    assert '| faster than naive |' in text
    assert 'Triton kernels run on CUDA devices' in text
    assert (tmp_path / 'layer.png').read_bytes().startswith(b'\x89PNG')
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ('target', 'kv_heads'),
    [
        (['layer', 'DeformableGQA', '--stages', '2'], ['all', '2 of 4', '1 of 4']),
        (
            ['backbone', 'mini'],
            ['all', '2 4 8 8 of 2 4 8 16', '2 4 4 4 of 2 4 8 16']
            + ['2 2 2 2 of 2 4 8 16', '1 1 1 1 of 2 4 8 16'],
        ),
    ],
)
def test_sweep_of_kv_heads(benchmark_tool, tmp_path, target, kv_heads):
    options = ['--kv-heads', 'sweep', '--directions', 'forward']
    report = run(benchmark_tool, tmp_path, *target, *options)
    assert [case['kv heads'] for case in report.cases] == kv_heads
    assert {row.status for row in report.rows} == {'ok'}


def test_layers_of_all_kinds(benchmark_tool, tmp_path):
    names = ['WindowAttention', 'ShiftedWindowAttention', 'PyramidAttention']
    names += ['DepthwiseConv', 'MultiheadGQA']
    report = run(benchmark_tool, tmp_path, 'layer', *names, '--stages', '1')
    assert [case['layer'] for case in report.cases] == names
    assert {row.backend for row in report.rows} == {PLAIN}


def test_layers_that_no_block_letter_stands_for(benchmark_tool, tmp_path):
    argv = ['layer', *OTHERS, '--stages', '1', '--backends', 'torch']
    report = run(benchmark_tool, tmp_path, *argv)
    assert [case['layer'] for case in report.cases] == list(OTHERS)
    assert {row.status for row in report.rows} == {'ok'}
    kv_heads = {case['layer']: case['kv heads'] for case in report.cases}
    assert kv_heads['MultiHeadAttention'] == 'all'
    assert kv_heads['MultiQueryAttention'].startswith('1 of')


def test_backbone(benchmark_tool, tmp_path):
    argv = ['backbone', 'mini', '--kv-heads', 'config', '4', '--amp', 'bf16']
    report = run(benchmark_tool, tmp_path, *argv)
    assert [case['kv heads'] for case in report.cases] == ['all', '2 4 4 4 of 2 4 8 16']
    assert report.options['dtype'] == 'bf16 autocast'
    assert report.environment['mmdet']
    full, fewer = report.cases
    assert full['params'] > fewer['params'] > 2e6
    forward, train = (
        next(row for row in report.rows if row.direction == name)
        for name in ('forward', 'train')
    )
    assert 2.9 < train.work['flops'] / forward.work['flops'] < 3


def test_backbone_of_a_config_and_a_stock_type(benchmark_tool, tmp_path):
    argv = ['backbone', DETECTOR, 'ResNet', '--directions', 'forward']
    options = ['--cfg-options', 'depth=18']
    report = run(benchmark_tool, tmp_path, *argv, *options)
    assert [row.backend for row in report.rows] == ['auto', PLAIN]


def test_breakdown(benchmark_tool, tmp_path):
    pytest.importorskip('matplotlib')
    argv = ['backbone', DETECTOR, '--breakdown', '--backends', 'naive', 'torch']
    report = run(benchmark_tool, tmp_path, *argv)
    parts = {case['part']: case['calls'] for case in report.cases}
    assert parts['D: DeformableGQA'] == 5
    assert parts['N: NeighborhoodAttention'] == 3
    assert parts['MLP'] == 8
    assert parts['stage 4 D: DeformableGQA'] == 2
    assert parts['downsampling'] == 3
    prefix = report.cases[0]['name'].removesuffix('/stem')
    types = [part for part in parts if not part.startswith('stage ')]
    for row in report.rows:
        if row.case == f'{prefix}/all':
            times = [
                report.row(f'{prefix}/{part}', row.backend, row.direction).timing
                for part in types
                if part != 'all'
            ]
            for number, total in enumerate(row.timing.samples_ms):
                assert sum(t.samples_ms[number] for t in times) == pytest.approx(total)
            assert row.peak_memory_mib > 0
    assert (
        '| naive ms | torch ms | ms ratio |' in (tmp_path / 'breakdown.md').read_text()
    )
    assert (tmp_path / 'breakdown-1.png').exists()


def test_breakdown_of_a_stock_backbone(benchmark_tool, tmp_path):
    argv = ['backbone', 'ResNet', '--breakdown', '--cfg-options', 'depth=18']
    report = run(benchmark_tool, tmp_path, *argv)
    parts = [case['part'] for case in report.cases]
    assert parts[-2:] == ['rest', 'all']
    assert 'layer4' in parts


def test_time_limit_of_a_breakdown(benchmark_tool, tmp_path):
    argv = ['backbone', DETECTOR, '--breakdown', '--time-limit-s', '1e-9']
    argv += ['--backends', 'torch', 'triton']
    report = run(benchmark_tool, tmp_path, *argv)
    assert {(r.backend, r.status) for r in report.rows} == {
        ('torch', 'skipped'),
        ('triton', 'unsupported'),
    }


def test_checkpoints(benchmark_tool, capsys, tmp_path):
    bad = tmp_path / 'bad.pth'
    torch.save({'other.weight': torch.zeros(1)}, bad)
    argv = ['backbone', 't++', '--checkpoint', str(bad), *TINY]
    assert benchmark_tool.main(argv) == 2
    assert 'holds no weight of this backbone' in capsys.readouterr().err


def test_time_limit(benchmark_tool, tmp_path):
    argv = ['layer', 'DepthwiseConv', '--stages', '1', '--time-limit-s', '1e-9']
    report = run(benchmark_tool, tmp_path, *argv)
    assert {row.status for row in report.rows} == {'skipped'}


def test_outputs_of_backends_must_agree(benchmark_tool, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(workload.TOLERANCE, None, -1.0)
    argv = ['layer', 'DeformableGQA', '--stages', '1', '--backends', 'naive', 'torch']
    assert benchmark_tool.main([*argv, *TINY, '--out', str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ''
    assert err.splitlines()[-1].endswith('of their norm')
    assert 'nothing reported: layer/DeformableGQA/stage1' in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('change', [0.1, float('nan')])
def test_agreement(change):
    first, second = torch.ones(4), torch.ones(4)
    agreement = workload.Agreement('case', None)
    agreement.check('a', lambda: first)
    agreement.check('b', lambda: second)
    second[0] += change
    with pytest.raises(GateError, match='case: outputs of b and a differ by'):
        agreement.check('b', lambda: second)


def test_a_training_step_leaves_no_gradient():
    model, x = nn.Linear(2, 2), torch.randn(3, 2, requires_grad=True)
    calls = workload.model_calls(
        lambda: {'out': [model(x)]}, model, torch.device('cpu'), None, inputs=[x]
    )
    loss = calls['train']()
    assert loss.requires_grad
    assert model.training
    assert [model.weight.grad, model.bias.grad, x.grad] == [None] * 3
    assert not calls['forward']()['out'][0].requires_grad
    assert not model.training


def test_picture_texts(benchmark_tool, tmp_path):
    pytest.importorskip('matplotlib')
    argv = ['layer', 'DeformableGQA', '--stages', '1', '--kv-heads', 'full', 'one']
    report = run(benchmark_tool, tmp_path, *argv, '--threads', '1')
    figure = model_figure(report, 'Layers')
    device = report.environment['device']
    assert figure.get_suptitle() == (
        'Layers: DeformableGQA, stage 1, 64x96 px, batch 1\n'
        + f'{device}, fp32, 1 thread'
    )
    time, memory, *_ = figure.axes
    assert time.get_xlabel() == 'ms a call (median, p20 to p80)'
    assert memory.get_xlabel() == 'MiB at the peak'
    labels = [text.get_text() for text in time.get_yticklabels()]
    kv_heads = ['all kv heads', '1 of 2 kv heads']
    assert labels == ['forward', *kv_heads, 'train', *kv_heads]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ['auto']
