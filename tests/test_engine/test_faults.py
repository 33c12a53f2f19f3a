"""A sample of ``python -m tests.faults``, and that the command finds what is lost."""

import json
import os

import pytest
import torch

from deform_gqa.engine import checkpoint_io
from deform_gqa.engine.checkpoint_io import AtomicLocalBackend
from tests.faults import __main__ as command
from tests.faults.trials import CLASSES, Trials

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='the trials are forks, in which CUDA does not run'
)


@pytest.fixture(scope='module')
def trials(tmp_path_factory):
    return Trials(tmp_path_factory.mktemp('trials'))


@pytest.mark.parametrize('name', CLASSES)
def test_nothing_is_lost(trials, name):
    assert trials.run(name, 1, 3) == ''


def test_writing_in_place_is_found(tmp_path, monkeypatch):
    def put(self, obj, filepath):
        with checkpoint_io.open(filepath, 'wb') as file:
            file.write(obj)

    monkeypatch.setattr(AtomicLocalBackend, 'put', put)
    monkeypatch.setattr(checkpoint_io, 'open', open, raising=False)
    trials = Trials(tmp_path)
    found = [trials.run('kill', number, 4) for number in range(4)]
    assert any(result.startswith('damaged') for result in found)


def test_renaming_before_the_data_are_synced_is_found(tmp_path, monkeypatch):
    def put(self, obj, filepath):
        part = f'{filepath}.part'
        with checkpoint_io.open(part, 'wb') as file:
            file.write(obj)
        os.replace(part, filepath)

    monkeypatch.setattr(AtomicLocalBackend, 'put', put)
    monkeypatch.setattr(checkpoint_io, 'open', open, raising=False)
    trials = Trials(tmp_path)
    found = [trials.run('power', number, 4) for number in range(4)]
    assert any(result.startswith('damaged') for result in found)


def test_report_goes_on_where_it_was(tmp_path, trials, monkeypatch, capsys):
    results = iter(['', 'other weights in iter_2.pth'])
    monkeypatch.setattr(Trials, '__init__', lambda self, folder: None)
    monkeypatch.setattr(Trials, 'calls', 9, raising=False)
    monkeypatch.setattr(Trials, 'run', lambda *args: next(results))
    options = ['--out', str(tmp_path), '--classes', 'kill', '--trials']
    assert command.main([*options, '1']) == 0
    assert command.main([*options, '2']) == 1
    assert command.main([*options, '2']) == 1
    report = json.loads((tmp_path / 'faults.json').read_text())
    assert report['results'] == {'kill': ['', 'other weights in iter_2.pth']}
    assert f'| {CLASSES["kill"]} | 2 | 1 |' in (tmp_path / 'faults.md').read_text()
    assert '- kill 1: other weights' in capsys.readouterr().out


def test_a_training_that_fails_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr('tests.faults.trials.LOOP', dict(type='NoLoop'))
    with pytest.raises(RuntimeError, match='the training itself fails'):
        Trials(tmp_path)
