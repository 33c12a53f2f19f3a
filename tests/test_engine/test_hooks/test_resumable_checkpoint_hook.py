import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.runner import FlexibleRunner
from tiny_training import CutHook, PowerCutError, make_runner

from deform_gqa.engine import ResumableCheckpointHook, load_checkpoint
from deform_gqa.engine.checkpoint_io import AtomicLocalBackend
from deform_gqa.engine.hooks import resumable_checkpoint_hook

SCRIPT = Path(__file__).parents[1] / 'tiny_training.py'


def run(work_dir: Path, *options: str) -> int:
    command = [sys.executable, str(SCRIPT), str(work_dir), *options]
    return subprocess.run(command, check=False, timeout=600).returncode


def weights(file: Path) -> dict:
    return load_checkpoint(file)['state_dict']


def assert_equal_weights(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def names(work_dir: Path) -> set[str]:
    return {path.name for path in work_dir.glob('*.pth')}


def train(work_dir: Path, **options):
    runner = make_runner(str(work_dir), **options)
    runner.train()
    return runner


def cut_power_at(monkeypatch, name: str) -> None:
    """Stops the training while it writes a file of this name."""
    put = AtomicLocalBackend.put

    def interrupted(self, obj, filepath):
        if Path(filepath).name == name:
            raise PowerCutError
        put(self, obj, filepath)

    monkeypatch.setattr(AtomicLocalBackend, 'put', interrupted)


@pytest.mark.parametrize('workers', ['0', '2'])
def test_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, workers):
    assert run(tmp_path / 'whole', '--workers', workers) == 0
    broken = tmp_path / 'broken'
    assert run(broken, '--workers', workers, '--kill-at', '7') == -signal.SIGKILL
    assert (broken / 'last_checkpoint').read_text() == str(broken / 'epoch_2.pth')
    assert run(broken, '--workers', workers, '--resume') == 0
    for epoch in (3, 4):
        assert_equal_weights(
            weights(tmp_path / 'whole' / f'epoch_{epoch}.pth'),
            weights(broken / f'epoch_{epoch}.pth'),
        )


def test_mmengines_hook_does_not_resume_exactly(tmp_path):
    """Without this the test above would prove nothing."""
    train(tmp_path / 'whole', type='CheckpointHook')
    (tmp_path / 'broken').mkdir()
    start = tmp_path / 'whole' / 'epoch_2.pth'
    (tmp_path / 'broken' / 'last_checkpoint').write_text(str(start))
    train(tmp_path / 'broken', resume=True, type='CheckpointHook')
    whole = weights(tmp_path / 'whole' / 'epoch_4.pth')
    broken = weights(tmp_path / 'broken' / 'epoch_4.pth')
    assert any(not torch.equal(whole[name], broken[name]) for name in whole)


def test_order_of_data_comes_back_without_a_given_seed(tmp_path):
    whole = train(tmp_path / 'whole', seed=None)
    (tmp_path / 'broken').mkdir()
    start = tmp_path / 'whole' / 'epoch_2.pth'
    (tmp_path / 'broken' / 'last_checkpoint').write_text(str(start))
    broken = train(tmp_path / 'broken', seed=None, resume=True)
    assert_equal_weights(whole.model.state_dict(), broken.model.state_dict())


def test_iteration_based_run_restores_the_draws_of_the_model(tmp_path):
    loop = dict(by_epoch=False, max_iters=5, val_interval=2)
    options = dict(loop=loop, by_epoch=False, interval=1, noise=False)
    whole = train(tmp_path / 'whole', **options)
    (tmp_path / 'broken').mkdir()
    start = tmp_path / 'whole' / 'iter_2.pth'
    (tmp_path / 'broken' / 'last_checkpoint').write_text(str(start))
    broken = train(tmp_path / 'broken', resume=True, **options)
    assert_equal_weights(whole.model.state_dict(), broken.model.state_dict())


def test_validation_leaves_the_random_states_alone(tmp_path):
    first = train(tmp_path / 'with')
    loop = dict(by_epoch=True, max_epochs=4, val_begin=9)
    second = train(tmp_path / 'without', loop=loop)
    last = [load_checkpoint(Path(r.work_dir, 'epoch_3.pth')) for r in (first, second)]
    assert_equal_weights(*(checkpoint['state_dict'] for checkpoint in last))


def test_keeps_the_newest_files(tmp_path):
    train(tmp_path, max_keep_ckpts=2)
    assert names(tmp_path) == {
        'best_score_epoch_2.pth',
        'epoch_3.pth',
        'epoch_4.pth',
    }


def test_old_files_outlive_a_cut_while_saving(tmp_path, monkeypatch):
    cut_power_at(monkeypatch, 'epoch_3.pth')
    with pytest.raises(PowerCutError):
        train(tmp_path, max_keep_ckpts=1)
    assert {'epoch_2.pth', 'best_score_epoch_2.pth'} <= names(tmp_path)
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_2.pth')


def test_resume_removes_what_a_cut_after_saving_left(tmp_path, monkeypatch):
    cut_power_at(monkeypatch, 'last_checkpoint')
    with pytest.raises(PowerCutError):
        train(tmp_path, max_keep_ckpts=1)
    monkeypatch.undo()
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    train(tmp_path, resume=True, max_keep_ckpts=1)
    assert names(tmp_path) == {'epoch_4.pth', 'best_score_epoch_2.pth'}


def test_former_best_outlives_a_cut_while_saving_the_next(tmp_path, monkeypatch):
    cut_power_at(monkeypatch, 'best_score_epoch_2.pth')
    with pytest.raises(PowerCutError):
        train(tmp_path)
    assert 'best_score_epoch_1.pth' in names(tmp_path)
    monkeypatch.undo()
    train(tmp_path, resume=True)
    # Epoch 2 was saved before its validation, which the resumed run makes up for.
    assert 'best_score_epoch_2.pth' in names(tmp_path)
    assert 'best_score_epoch_1.pth' not in names(tmp_path)


def test_best_score_holds_across_resume(tmp_path):
    train(tmp_path, loop=dict(by_epoch=True, max_epochs=3))
    assert 'best_score_epoch_2.pth' in names(tmp_path)
    train(tmp_path, resume=True)  # the fourth score is below that of the second
    assert 'best_score_epoch_2.pth' in names(tmp_path)
    assert 'best_score_epoch_4.pth' not in names(tmp_path)


def test_several_best_files(tmp_path):
    options = dict(save_best=['score', 'loss_score'], rule=['greater', 'less'])
    train(tmp_path, **options)
    assert {'best_score_epoch_2.pth', 'best_loss_score_epoch_3.pth'} <= names(tmp_path)
    assert sum(name.startswith('best') for name in names(tmp_path)) == 2


def test_checkpoint_without_random_states_warns(tmp_path):
    train(tmp_path, type='CheckpointHook', loop=dict(by_epoch=True, max_epochs=2))
    warnings = logged(make_runner(str(tmp_path), resume=True))
    assert any('holds no random states' in text for text in warnings)


def test_other_number_of_processes_warns(tmp_path, monkeypatch):
    train(tmp_path, loop=dict(by_epoch=True, max_epochs=2))
    monkeypatch.setattr(resumable_checkpoint_hook, 'get_world_size', lambda: 2)
    warnings = logged(make_runner(str(tmp_path), resume=True))
    assert any('written by 1 processes and is resumed by 2' in w for w in warnings)


def logged(runner) -> list[str]:
    """The warnings of a training."""
    texts = []
    runner.logger.warning = texts.append
    runner.train()
    return texts


def test_weights_to_start_from_bring_no_random_states(tmp_path):
    train(tmp_path / 'first')
    first = make_runner(str(tmp_path / 'second'))
    first.load_checkpoint(str(tmp_path / 'first' / 'epoch_4.pth'))
    first.train()
    second = make_runner(str(tmp_path / 'third'))
    plain = {'state_dict': weights(tmp_path / 'first' / 'epoch_4.pth')}
    torch.save(plain, tmp_path / 'plain.pth')
    second.load_checkpoint(str(tmp_path / 'plain.pth'))
    second.train()
    assert_equal_weights(first.model.state_dict(), second.model.state_dict())


def test_own_worker_init_fn_is_kept(tmp_path):
    runner = make_runner(str(tmp_path), workers=1)
    runner._train_dataloader['worker_init_fn'] = dict(type=leave_alone)
    runner.train()
    assert runner.train_dataloader.worker_init_fn.func is leave_alone


def leave_alone(worker_id: int) -> None:
    pass


def test_saves_into_out_dir(tmp_path):
    train(tmp_path / 'run', out_dir=str(tmp_path / 'out'))
    assert 'epoch_4.pth' in names(tmp_path / 'out' / 'run')
    assert os.path.isfile((tmp_path / 'run' / 'last_checkpoint').read_text())


PLATEAU = dict(
    type='ReduceOnPlateauLR', monitor='score', rule='greater', patience=0, factor=0.1
)


@pytest.mark.parametrize('scores', [(0.6, 0.9, 0.7, 0.8), (0.9, 0.6, 0.5, 0.4)])
@pytest.mark.parametrize(
    'loop',
    [
        dict(by_epoch=True, max_epochs=4),
        dict(type='ResumableIterBasedTrainLoop', max_iters=4, val_interval=1),
    ],
    ids=['epochs', 'iterations'],
)
def test_cut_in_validation_loses_nothing(tmp_path, scores, loop):
    options = dict(scores=scores, loop=loop, by_epoch='max_epochs' in loop)
    options['scheduler'] = PLATEAU
    # The scores are told apart by the epoch, which iteration-based loops leave at 0.
    if 'max_iters' in loop:
        options['scores'] = scores[:1]
    whole = train(tmp_path / 'whole', **options)
    for number in range(1, 4):
        work_dir = tmp_path / str(number)
        with pytest.raises(PowerCutError):
            train(work_dir, hooks=(CutHook('after_val_iter', 3 * number),), **options)
        broken = train(work_dir, resume=True, **options)
        assert_equal_weights(whole.model.state_dict(), broken.model.state_dict())
        assert names(work_dir) == names(tmp_path / 'whole')


def test_validation_that_is_done_is_not_done_again(tmp_path):
    with pytest.raises(PowerCutError):
        train(tmp_path, hooks=(CutHook('before_train_iter', 5),))
    assert load_checkpoint(tmp_path / 'epoch_1.pth')['progress']['validated']
    resumed = make_runner(str(tmp_path), resume=True, hooks=(CutHook('before_val', 3),))
    with pytest.raises(PowerCutError):
        resumed.train()
    assert resumed.epoch == 4  # after those of epochs 2 and 3


def test_validation_that_was_not_due_is_not_made_up_for(tmp_path):
    loop = dict(by_epoch=True, max_epochs=2, val_interval=2)
    with pytest.raises(PowerCutError):
        train(tmp_path, loop=dict(loop), hooks=(CutHook('before_train_iter', 5),))
    train(tmp_path, loop=dict(loop), resume=True)
    assert 'best_score_epoch_2.pth' in names(tmp_path)


def test_flexible_runner_saves_in_one_step(tmp_path, monkeypatch):
    whole = train(tmp_path / 'whole', runner_type=FlexibleRunner)
    cut_power_at(monkeypatch, 'epoch_3.pth')
    with pytest.raises(PowerCutError):
        train(tmp_path / 'broken', runner_type=FlexibleRunner)
    monkeypatch.undo()
    saved = load_checkpoint(tmp_path / 'broken' / 'epoch_2.pth')
    assert (saved['meta']['epoch'], saved['meta']['iter']) == (2, 6)
    broken = train(tmp_path / 'broken', resume=True, runner_type=FlexibleRunner)
    assert_equal_weights(whole.model.state_dict(), broken.model.state_dict())


def test_best_of_a_validation_that_comes_first_is_noted(tmp_path):
    loop = dict(type='ResumableEpochBasedTrainLoop', max_epochs=2)
    options = dict(interval=2, save_last=False, by_epoch=False, loop=loop)
    train(tmp_path / 'whole', **options)
    with pytest.raises(PowerCutError):
        train(tmp_path / 'broken', hooks=(CutHook('before_val', 1),), **options)
    train(tmp_path / 'broken', resume=True, **options)
    assert names(tmp_path / 'broken') == names(tmp_path / 'whole')


def test_former_best_that_a_cut_left_goes(tmp_path, monkeypatch):
    remove = ResumableCheckpointHook._remove

    def cut(self, path):
        if Path(path).name == 'best_score_epoch_1.pth':
            raise PowerCutError
        remove(self, path)

    monkeypatch.setattr(ResumableCheckpointHook, '_remove', cut)
    with pytest.raises(PowerCutError):
        train(tmp_path)
    assert 'best_score_epoch_1.pth' in names(tmp_path)
    monkeypatch.undo()
    train(tmp_path, resume=True)
    assert 'best_score_epoch_1.pth' not in names(tmp_path)
    assert 'best_score_epoch_2.pth' in names(tmp_path)


def test_each_process_gets_its_own_buffers(tmp_path, monkeypatch):
    def gather(value):
        is_rng = 'numpy' in value
        return [value, value if is_rng else {key: x + 1 for key, x in value.items()}]

    def make(**options):
        runner = make_runner(str(tmp_path), loop=loop, **options)
        runner.model.register_buffer('mean', torch.full((2,), 3.0))
        return runner

    loop = dict(by_epoch=True, max_epochs=1)
    monkeypatch.setattr(resumable_checkpoint_hook, 'get_world_size', lambda: 2)
    monkeypatch.setattr(resumable_checkpoint_hook, 'all_gather_object', gather)
    make().train()
    monkeypatch.setattr(resumable_checkpoint_hook, 'get_rank', lambda: 1)
    second = make(resume=True)
    second.train()
    assert second.model.mean.tolist() == [4.0, 4.0]


def test_parts_of_a_killed_run_go(tmp_path):
    part = tmp_path / 'epoch_9.pth.part'
    part.write_bytes(b'half')
    train(tmp_path, loop=dict(by_epoch=True, max_epochs=1))
    assert not part.exists()
