import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from tiny_training import Points, make_runner

from deform_gqa.engine import PreemptionHook
from deform_gqa.engine.hooks.preemption_hook import EXIT_PREEMPTED

LOOP = dict(type='ResumableEpochBasedTrainLoop', max_epochs=3)


class SignalHook(Hook):
    """Sends this process a signal at the n-th call of one of its methods."""

    def __init__(self, method: str, number: int, name: str = 'SIGTERM') -> None:
        self.calls = 0

        def send(runner, **kwargs) -> None:
            self.calls += 1
            if self.calls == number:
                os.kill(os.getpid(), getattr(signal, name))

        setattr(self, method, send)


def make(work_dir: Path, *hooks: Hook, **options):
    options.setdefault('loop', dict(LOOP))
    return make_runner(str(work_dir), hooks=(PreemptionHook(), *hooks), **options)


def stop(runner) -> None:
    with pytest.raises(SystemExit) as stopped:
        runner.train()
    assert stopped.value.code == EXIT_PREEMPTED == 75


def assert_same_weights(first, second) -> None:
    second = second.model.state_dict()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    runner = make(tmp_path_factory.mktemp('whole'))
    runner.train()
    return runner


@pytest.mark.parametrize(
    ('method', 'number', 'name', 'stops_at', 'file'),
    [
        ('before_train_iter', 2, 'SIGUSR1', 2, 'interrupted.pth'),
        ('before_train_iter', 6, 'SIGTERM', 6, 'interrupted.pth'),
        ('before_val_iter', 2, 'SIGTERM', 3, 'epoch_1.pth'),
        ('before_train_epoch', 2, 'SIGTERM', 4, 'interrupted.pth'),
    ],
)
@pytest.mark.parametrize('workers', [0, 1])
def test_stops_after_the_iteration_and_goes_on(
    tmp_path, whole, method, number, name, stops_at, file, workers
):
    runner = make(tmp_path, SignalHook(method, number, name), workers=workers)
    stop(runner)
    assert runner.iter in (stops_at, stops_at - 1)  # before it is counted
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / file)
    resumed = make(tmp_path, resume=True, workers=workers)
    resumed.train()
    assert_same_weights(whole, resumed)
    assert not (tmp_path / 'interrupted.pth').exists()
    assert (tmp_path / 'epoch_3.pth').exists()
    assert 'best_score_epoch_2.pth' in os.listdir(tmp_path)


def test_a_validation_of_what_is_not_saved_comes_first(tmp_path):
    options = dict(interval=9, save_best=None, rule=None)
    runner = make(tmp_path, SignalHook('before_val_iter', 1), **options)
    stop(runner)
    assert (tmp_path / 'last_checkpoint').read_text().endswith('interrupted.pth')
    assert runner.iter == 3


def test_waits_for_gradients_that_accumulate(tmp_path):
    options = dict(optim=dict(accumulative_counts=2))
    whole = make(tmp_path / 'whole', **options)
    whole.train()
    runner = make(tmp_path, SignalHook('before_train_iter', 5), **options)
    stop(runner)
    assert runner.iter == 5  # the sixth, not yet counted
    resumed = make(tmp_path, resume=True, **options)
    resumed.train()
    assert_same_weights(whole, resumed)


def test_iteration_based(tmp_path):
    options = dict(
        loop=dict(type='ResumableIterBasedTrainLoop', max_iters=5), by_epoch=False
    )
    whole = make(tmp_path / 'whole', **options)
    whole.train()
    stop(make(tmp_path, SignalHook('before_train_iter', 3), interval=9, **options))
    resumed = make(tmp_path, resume=True, interval=9, **options)
    resumed.train()
    assert_same_weights(whole, resumed)


def test_workers_ignore_what_the_scheduler_sends_to_all(tmp_path, monkeypatch):
    item = Points.__getitem__

    def getitem(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 3:
            for name in ('TERM', 'USR1'):
                command = f'kill -{name} {os.getpid()}'
                subprocess.run(['sh', '-c', command], check=True)
        return item(self, index)

    monkeypatch.setattr(Points, '__getitem__', getitem)
    runner = make(tmp_path, workers=1, loop=dict(LOOP, max_epochs=1))
    runner.train()
    assert runner.iter == 3


def test_workers_end_when_the_training_says_so(tmp_path):
    runner = make(tmp_path, workers=1, persistent_workers=True)
    runner.train()
    (worker,) = runner.train_dataloader._iterator._workers
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=30)
    assert not worker.is_alive()


def test_signals_are_given_back(tmp_path):
    def other(number, frame):
        raise AssertionError

    former = signal.signal(signal.SIGUSR1, other)
    try:
        make(tmp_path, loop=dict(LOOP, max_epochs=1)).train()
        assert signal.getsignal(signal.SIGUSR1) is other
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_other_threads_are_told_that_no_signal_comes(tmp_path):
    runner = make(tmp_path, loop=dict(LOOP, max_epochs=1))
    warnings = []
    runner.logger.warning = warnings.append
    thread = threading.Thread(target=runner.train)
    thread.start()
    thread.join()
    assert any('does not run in the main thread' in text for text in warnings)


def test_unknown_signal():
    with pytest.raises(ValueError, match="such as SIGTERM, got 'SIGFOO'"):
        PreemptionHook(signals=['SIGFOO'])


def test_needs_a_hook_that_saves(tmp_path):
    runner = make(tmp_path, type='CheckpointHook')
    with pytest.raises(ValueError, match=r'needs a ResumableCheckpointHook .*got \['):
        runner.train()


def test_a_validation_without_training_goes_on(tmp_path):
    hook = PreemptionHook()
    hook._received = signal.SIGTERM
    hook.after_val_iter(make(tmp_path), 0)
