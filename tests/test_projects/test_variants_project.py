"""projects/gqa_variants: its rows, one of them trained, the report, the search."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

sys.path.insert(0, str(Path(__file__).parents[2]))

from projects.gqa_variants import experiment
from projects.gqa_variants.gqa_variants import report, search, training
from projects.gqa_variants.gqa_variants.rows import ROWS


@pytest.fixture(autouse=True, scope='module')
def _registered():
    register_all_modules()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A data set of two small images, and a model and calls that take no time."""
    boxes, images = [], []
    for i in range(2):
        image = np.full((60, 80, 3), 30, dtype=np.uint8)
        image[20:40, 10:50] = 200
        cv2.imwrite(str(tmp_path / f'{i}.jpg'), image)
        images.append(dict(id=i, file_name=f'{i}.jpg', width=80, height=60))
        boxes.append(
            dict(
                id=i,
                image_id=i,
                category_id=0,
                bbox=[10, 20, 40, 20],
                area=800,
                iscrowd=0,
            )
        )
    names = ('RBC', 'WBC', 'Platelets')
    categories = [dict(id=i, name=name) for i, name in enumerate(names)]
    data = dict(images=images, annotations=boxes, categories=categories)
    (tmp_path / 'data.json').write_text(json.dumps(data))
    make_config = training.make_config

    def small(backbone, work_dir, epochs=None, seed=0):
        cfg = make_config(backbone, work_dir, epochs, seed)
        for split in ('train', 'val', 'test'):
            cfg[f'{split}_dataloader'].dataset.update(
                data_root=str(tmp_path), ann_file='data.json', data_prefix=dict(img='')
            )
            if split != 'train':
                cfg[f'{split}_evaluator'].ann_file = str(tmp_path / 'data.json')
        cfg.custom_hooks = []
        cfg.work_dir = str(work_dir)
        return cfg

    for module in (experiment, search):
        monkeypatch.setattr(module, 'make_config', small)
    monkeypatch.setattr(training, 'CALLS', 1)
    monkeypatch.setattr(training, 'WARMUP_CALLS', 0)
    monkeypatch.setattr(training, 'IMAGE_SIZE', (64, 64))
    return tmp_path


def test_every_row_builds():
    options = training.make_config({}, Path('unused')).model.backbone
    for name, override in ROWS.items():
        with torch.device('meta'):
            backbone = MODELS.build(dict(options, attention=dict(D=dict(override))))
        wanted = override.get('type', 'DeformableGQA')
        assert type(backbone.stages[3].attns[0]).__name__ == wanted, name


def test_a_row_is_run_once_and_reported(tiny, capsys):
    results = tiny / 'results'
    argv = ['table', '--rows', '^pyramid$', '--epochs', '1', '--results', str(results)]
    argv += ['--work-dir', str(tiny / 'work')]
    experiment.main(argv)
    before = (results / 'pyramid.json').read_bytes()
    measured = json.loads(before)
    assert measured['epochs'] == 1 and measured['latency_ms'] > 0
    assert 0 <= measured['bbox_mAP'] <= 1
    experiment.main(argv)
    assert (results / 'pyramid.json').read_bytes() == before
    (results / 'pyramid.json').write_text(json.dumps(dict(measured, step_ms=-1.0)))
    experiment.main(['measure', '--results', str(results)])
    again = json.loads((results / 'pyramid.json').read_text())
    assert again.keys() == measured.keys() and again['step_ms'] > 0
    text = (results / 'table.md').read_text()
    assert '| pyramid | ' in text and '| latent | not measured yet' in text
    assert (results / 'map_latency.png').read_bytes().startswith(b'\x89PNG')
    assert text.strip() in capsys.readouterr().out


def test_a_report_without_results(tmp_path):
    assert report.write_report(tmp_path).count('not measured yet') == 5 * len(ROWS)
    assert not (tmp_path / 'map_latency.png').exists()


class Choices:
    """A trial that takes one choice of each list."""

    def __init__(self, index):
        self.index = index

    def suggest_categorical(self, name, choices):
        return choices[self.index]


@pytest.mark.parametrize(
    ('index', 'kv_heads', 'groups', 'strides'),
    [
        (0, (2, 4, 8, 16), (2, 4, 8, 16), (8, 4, 2, 1)),
        (-1, (1, 1, 1, 1), (1, 1, 1, 1), (32, 16, 8, 4)),
        (2, (1, 1, 2, 4), (1, 1, 2, 4), (32, 16, 8, 4)),
    ],
)
def test_choices_of_the_search(index, kv_heads, groups, strides):
    options = search.suggest_backbone(Choices(index))
    assert tuple(options['num_kv_heads']) == kv_heads
    assert tuple(options['arch']['offset_groups']) == groups
    assert tuple(options['arch']['strides']) == strides
    cfg = training.make_config(options, Path('unused'))
    assert training.count_parameters(cfg) > 0


@pytest.mark.parametrize('budget_ms', [1e9, 0.0])
def test_search_goes_on_from_its_study(tiny, monkeypatch, budget_ms):
    pytest.importorskip('optuna', reason='needs the extra "search"')
    trained = []

    def train_and_test(cfg, split):
        trained.append(split)
        return 0.1 * len(trained)

    monkeypatch.setattr(search, 'train_and_test', train_and_test)
    first = search.search(tiny / 'search', budget_ms, trials=1, epochs=1)
    best = search.search(tiny / 'search', budget_ms, trials=2, epochs=1)
    assert (tiny / 'search/history.png').read_bytes().startswith(b'\x89PNG')
    if budget_ms == 0:
        assert first == best == {} and not trained
    else:
        assert trained == ['val', 'val']
        assert best['bbox_mAP'] == pytest.approx(0.2)
