import json

import pytest

from deform_gqa.benchmark.models.hook_overhead import schedule, summarize

CONFIG = """
custom_imports = dict(imports=['napping_training'])
model = dict(type='NapModel')
train_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dict(type='Items', nap_ms=0.0),
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='pseudo_collate'))
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
default_scope = 'mmengine'
"""


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--interval 2', '--interval must be at least 3, got 2'),
        ('--interval -5', '--interval: must be positive, got -5'),
        ('--pairs 0', '--pairs: must be positive, got 0'),
        ('--threads 0', '--threads: must be positive, got 0'),
        ('no.py', "config file 'no.py' does not exist"),
        ('--out setup.cfg', "--out: 'setup.cfg' cannot be a folder"),
    ],
)
def test_wrong_options(benchmark_tool, capsys, options, message):
    assert benchmark_tool.main(['hook-overhead', *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_schedule():
    plan = schedule(4)
    assert plan == [False, True, True, False, False, True, True, False]
    assert all(sum(plan[i : i + 2]) == 1 for i in range(0, 8, 2))


def test_summary():
    plain, sampled = [10.0] * 4, [14.0, 10.0, 10.0, 10.0]
    blocks = [
        dict(with_hook=on, wall_ms=times, cpu_ms=plain)
        for on, times in zip(
            schedule(2), (plain, sampled, sampled, [20.0] * 4), strict=True
        )
    ]
    wall = summarize(blocks)['wall']
    assert wall['iteration_ms'] == 15
    assert wall['samples']['median'] == pytest.approx(0.1)
    assert wall['blocks']['median'] == pytest.approx((0.1 - 0.45) / 2)
    assert wall['noise']['median'] == pytest.approx(1.0)
    assert summarize(blocks)['cpu']['samples']['median'] == 0
    assert summarize(blocks[:2])['wall']['noise'] is None


def test_tiny_run(benchmark_tool, capsys, tmp_path, monkeypatch):
    from mmengine.registry import DATASETS, MODELS
    from napping_training import Items, NapModel

    MODELS.register_module(module=NapModel, force=True)
    DATASETS.register_module(module=Items, force=True)
    config = tmp_path / 'config.py'
    config.write_text(CONFIG)
    argv = ['hook-overhead', str(config), '--interval', '3', '--pairs', '2']
    assert benchmark_tool.main([*argv, '--out', str(tmp_path / 'out')]) == 0
    assert '# Overhead of RuntimeBenchmarkHook' in capsys.readouterr().out
    record = json.loads((tmp_path / 'out' / 'hook-overhead.json').read_text())
    assert [block['with_hook'] for block in record['blocks']] == schedule(2)
    for block in record['blocks']:
        assert len(block['wall_ms']) == len(block['cpu_ms']) == 3
        assert min(block['wall_ms']) > 0
    assert (tmp_path / 'out' / 'hook-overhead.md').exists()
    assert (tmp_path / 'out' / 'hook-overhead.png').stat().st_size > 1000
