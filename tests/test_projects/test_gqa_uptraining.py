"""projects/gqa_uptraining: its rows, how they are run, and the report."""

import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).parents[2]))

from projects.gqa_uptraining import experiment as command
from projects.gqa_uptraining.gqa_uptraining import report
from projects.gqa_uptraining.gqa_uptraining.execution import (
    BASE_CONFIG,
    Experiment,
    build_detector,
)
from projects.gqa_uptraining.gqa_uptraining.rows import (
    DISTILLED,
    KV_HEADS,
    QUERY_HEADS,
    Row,
    base_row,
    plan,
    selection_rows,
)

MEAN = Row(1, 'one', 'mean', 0.05)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    register_all_modules()
    # formats the config, half a second each time that it is copied
    monkeypatch.setattr(Config, 'pretty_text', 'config')


@pytest.fixture
def experiment(tmp_path):
    return Experiment(tmp_path / 'work', tmp_path / 'results')


# Rows


def test_plan_has_what_the_paper_compares():
    rows = plan()
    assert len({row.name for row in rows}) == len(rows)
    for seed in range(3):
        own = {(r.kv_heads, r.method, r.alpha) for r in rows if r.seed == seed}
        for kv_heads in KV_HEADS:
            means = {(kv_heads, 'mean', a) for a in (0, 0.02, 0.05, 0.1, 0.2)}
            assert means | {(kv_heads, 'scratch', 0.05)} <= own
        for method in (
            'first',
            'random',
            'norm',
            'aligned',
            'aligned+refit',
            DISTILLED,
        ):
            assert {('one', method, 0.05), ('one', method, 0.1)} <= own
    trains = [row.alpha > 0 for row in rows]
    assert trains == sorted(trains)  # conversions alone come first
    methods = [row.method for row in rows]
    assert set(methods[methods.index('scratch') :]) == {'scratch'}


def test_iterations():
    assert base_row(0).iters == 24 * 52
    assert [Row(0, 'one', 'mean', a).iters for a in (0, 0.02, 0.05, 0.2)] == [
        *(0, 25, 62, 250)
    ]
    assert Row(0, 'one', 'scratch', 0.05).iters == 24 * 52 + 62


def test_kv_heads_divide_the_query_heads():
    for kv_heads in KV_HEADS.values():
        assert not any(q % k for q, k in zip(QUERY_HEADS, kv_heads, strict=True))


def test_another_choice_is_another_training(experiment):
    rows = selection_rows()
    assert len({experiment.folder(row) for row in rows}) == len(rows)
    assert len({experiment.result_file(row, 'val') for row in rows}) == len(rows)
    assert rows[1].training == 'seed0_one_mean_0.05_lr3e-05'
    assert rows[-1].training == f'seed0_one_{DISTILLED}_0.05_lr3e-05_weight3'
    # results of the plan are not overwritten
    assert not {r.name for r in plan()} & {r.training for r in rows}


# Configs


def test_config_of_uptraining(experiment):
    cfg = experiment.config(MEAN)
    assert cfg.model.backbone.num_kv_heads == (1, 1, 1, 1)
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 62
    assert cfg.param_scheduler[0].end == 6
    assert cfg.load_from == str(experiment.work_dir / 'seed1/converted_one_mean.pth')
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook']
    assert cfg.randomness == dict(seed=1)
    assert cfg.default_hooks.checkpoint.type == 'ResumableCheckpointHook'


def test_config_of_distillation(experiment):
    row = Row(1, 'one', DISTILLED, 0.05)
    cfg = experiment.config(row)
    assert cfg.load_from == experiment.config(MEAN).load_from
    assert cfg.custom_hooks[-1] == dict(
        type='AttentionDistillationHook',
        teacher_config=str(BASE_CONFIG),
        teacher_ckpt=str(experiment.work_dir / 'seed1/base/epoch_24.pth'),
        loss_weight=1.0,
    )


def test_config_of_a_control(experiment):
    cfg = experiment.config(Row(2, 'quarter', 'scratch', 0.05))
    assert cfg.model.backbone.num_kv_heads == (1, 1, 2, 4)
    assert cfg.load_from is None
    base = experiment.config(base_row(2))
    assert base.model.backbone.num_kv_heads is None
    assert cfg.optim_wrapper == base.optim_wrapper
    assert cfg.param_scheduler[0].end == base.param_scheduler[0].end
    assert cfg.param_scheduler[1].end == cfg.train_cfg.max_iters == 1310


# Which row is run


class Recorder(Experiment):
    """Runs nothing, and remembers what it would have run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / 'work', folder / 'results')
        self.ran = []

    def run(self, row, split='test'):
        self.ran.append(row)
        for file in (self.result_file(row, split), self.checkpoint(row)):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()


def test_rows_wait_for_their_base_and_run_once(tmp_path):
    recorder = Recorder(tmp_path)
    rows = [MEAN, base_row(1)]
    command.run_rows(recorder, rows, 'test')
    assert recorder.ran == [base_row(1), MEAN]
    command.run_rows(recorder, rows, 'test')
    assert len(recorder.ran) == 2


def test_rows_of_another_process_are_left_to_it(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path)
    with command._lock(recorder.work_dir / 'locks' / base_row(0).training) as free:
        assert free
        command.run_rows(recorder, [base_row(0), base_row(1)], 'test', wait=False)
        assert recorder.ran == [base_row(1)]

    def other_process_ends(_):
        recorder.run(base_row(0))

    monkeypatch.setattr(command.time, 'sleep', other_process_ends)
    with command._lock(recorder.work_dir / 'locks' / base_row(0).training):
        command.run_rows(recorder, [base_row(0)], 'test')
    assert recorder.ran == [base_row(1), base_row(0)]


# A row from beginning to end, on four small images


def write_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    boxes, images = [], []
    for index in range(4):
        name = f'{index}.png'
        cv2.imwrite(str(folder / name), rng.integers(0, 255, (48, 64, 3), np.uint8))
        images.append(dict(id=index, file_name=name, height=48, width=64))
        box = dict(bbox=[8, 8, 24, 24], area=576, iscrowd=0, category_id=1)
        boxes.append(dict(box, id=index + 1, image_id=index))
    categories = [
        dict(id=i, name=name) for i, name in enumerate(('RBC', 'WBC', 'Platelets'), 1)
    ]
    record = dict(images=images, annotations=boxes, categories=categories)
    (folder / 'all.json').write_text(json.dumps(record))


class SmallExperiment(Experiment):
    def config(self, row):
        cfg = super().config(row)
        for split in ('train', 'val', 'test'):
            dataset = cfg[f'{split}_dataloader'].dataset
            dataset.data_root = str(self.work_dir)
            dataset.ann_file, dataset.data_prefix = 'all.json', dict(img='')
            for transform in dataset.pipeline:
                if transform.type == 'Resize':
                    transform.scale = (64, 48)
        for split in ('val', 'test'):
            cfg[f'{split}_evaluator'].ann_file = str(self.work_dir / 'all.json')
        return cfg


def test_rows_from_beginning_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(Row, 'iters', property(lambda row: 2 if row.alpha else 0))
    experiment = SmallExperiment(tmp_path, tmp_path / 'results')
    write_data(tmp_path)
    torch.manual_seed(0)
    base = experiment.checkpoint(base_row(0))
    base.parent.mkdir(parents=True)
    multi_head = build_detector(experiment.config(base_row(0)))
    torch.save(dict(state_dict=multi_head.state_dict()), base)

    rows = [Row(0, 'one', 'mean'), Row(0, 'one', 'aligned+refit')]
    rows.append(Row(0, 'one', DISTILLED, 0.05))
    command.run_rows(experiment, rows, 'test')
    mean, refitted, distilled = (
        json.loads(experiment.result_file(row).read_text()) for row in rows
    )
    last = mean['layers']['backbone.stages.3.attns.1']
    assert last['kv_heads'] == [16, 1]
    assert (
        0
        < refitted['layers']['backbone.stages.3.attns.1']['output_error']
        < (last['output_error'])
    )
    assert mean['kv_heads_per_stage'] == [1, 1, 1, 1]
    assert 'bbox_mAP' in mean['metrics']
    assert (distilled['iters'], mean['iters']) == (2, 0)
    assert experiment.checkpoint(rows[2]).exists()
    # converted once for both rows with the mean
    folder = experiment.work_dir / 'seed0'
    assert {path.name for path in folder.glob('*.pth')} == {
        'converted_one_mean.pth',
        'converted_one_aligned+refit.pth',
    }


# Report


def write_results(folder: Path, missing: Row) -> None:
    folder.mkdir()
    scores = dict(zip(('mean', 'first', DISTILLED), (0.48, 0.4, 0.49), strict=True))
    for row in plan():
        if row == missing:
            continue
        score = 0.5 if row.method == 'multi-head' else scores.get(row.method, 0.3)
        record = dict(metrics=dict(bbox_mAP=score + 0.01 * row.seed))
        if row.base is not None and row.iters == 0:
            record['layers'] = dict(a=dict(output_error=0.2), b=dict(output_error=0.4))
        (folder / f'{row.name}.json').write_text(json.dumps(record))


def test_report(tmp_path):
    missing = Row(2, 'half', 'scratch', 0.05)
    write_results(tmp_path / 'results', missing)
    times = dict(all=[4.0, 5.0, 6.0], half=[3.0, 4.0, 5.0])
    (tmp_path / 'results/times.json').write_text(json.dumps(dict(times_ms=times)))
    readme = tmp_path / 'README.md'
    readme.write_text(f'before\n{report.BEGIN}\nold\n{report.END}\nafter\n')
    report.write_report(tmp_path / 'results')
    text = readme.read_text()
    assert text.startswith('before\n')
    assert text.endswith('\nafter\n')
    assert 'old' not in text
    assert (
        '| multi-head | multi-head | 0 | 3 of 3 | 0.510 ± 0.010 | 100.0 ± 0.0 % |  |'
        in text
    )
    assert (
        '| mean | 0 | 3 of 3 | 0.490 ± 0.010 | 96.1 ± 0.1 % | 0.300 ± 0.000 |' in text
    )
    assert '| Hq/2 kv heads | scratch | 0.05 | 2 of 3 | 0.305 ± 0.007 |' in text
    assert f'1 of {len(plan())} rows have not been run yet' in text
    for number in (3, 4, 5):
        assert (tmp_path / f'results/figure_{number}.png').stat().st_size > 5000
    once = readme.read_bytes()
    report.write_report(tmp_path / 'results')
    assert readme.read_bytes() == once


def test_report_on_nothing_yet(tmp_path):
    (tmp_path / 'results').mkdir()
    (tmp_path / 'README.md').write_text(f'{report.BEGIN}\n{report.END}\n')
    report.write_report(tmp_path / 'results')
    text = (tmp_path / 'README.md').read_text()
    count = len(plan())
    assert re.search(f'{count} of {count} rows have not been run', text)
    assert '| 1 kv head | norm | 0 | 0 of 3 | not run yet |' in text


def test_report_needs_its_place_in_the_readme(tmp_path):
    (tmp_path / 'results').mkdir()
    (tmp_path / 'README.md').write_text('nothing\n')
    with pytest.raises(ValueError, match=r'README.md has no line .*results'):
        report.write_report(tmp_path / 'results')


def test_spread():
    assert report.spread([]) == ''
    assert report.spread([0.5]) == '0.500'
    assert report.spread([0.4, 0.6]) == '0.500 ± 0.141'
