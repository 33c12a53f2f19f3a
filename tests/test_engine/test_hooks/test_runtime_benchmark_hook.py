import errno
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook, iter_timer_hook
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from napping_training import NapModel, NapSGD, make_runner
from torch import nn
from virtual_time import use_virtual_time

from deform_gqa.engine import RuntimeBenchmarkHook
from deform_gqa.engine.checkpoint_io import AtomicLocalBackend
from deform_gqa.engine.hooks import runtime_benchmark_hook
from deform_gqa.profiling import clock, step_timing

NAP_MS = 20.0
STEP_PHASES = ['preprocess', 'forward', 'backward', 'optimizer']
TRAIN_PHASES = ['data', *STEP_PHASES, 'other', 'hooks']
EVAL_PHASES = ['data', 'preprocess', 'forward', 'other', 'evaluator']


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch):
    """No time passes but the naps, as mmengine's own timer sees it too."""
    modules = (clock, step_timing, runtime_benchmark_hook, iter_timer_hook)
    use_virtual_time(monkeypatch, *modules)


def naps(count=1):
    return pytest.approx(count * NAP_MS)


def report(runner) -> dict:
    """The run in the JSON file of its log folder."""
    record = json.loads(Path(runner.log_dir, 'runtime_benchmark.json').read_text())
    assert record['format_version'] == 1
    return record['runs'][-1]


def samples(runner, mode='train') -> list[dict]:
    return report(runner)['samples'][mode]


def trained(*args, **kwargs):
    runner = make_runner(*args, **kwargs)
    runner.train()
    return runner


def assert_clean(runner) -> None:
    """Nothing of ours is on the model or its optimizer."""
    for module in runner.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not {'train_step', 'val_step', 'test_step'} & set(vars(module))
    for name in ('backward', 'step', 'zero_grad'):
        assert name not in vars(runner.optim_wrapper)


def assert_same_weights(first, second) -> None:
    first, second = first.model.state_dict(), second.model.state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_which_iterations_are_sampled(tmp_path):
    runner = trained(tmp_path)
    assert [s['iter'] for s in samples(runner)] == [3, 6, 9, 12]
    assert [s['iter'] for s in samples(runner, 'val')] == [3, 5, 7, 9, 11]
    assert samples(runner, 'test') == []
    # hooks are on the modules then, and at no other time
    model = runner.model
    train = [i + 1 for i in range(24) if model.hooked[i] and i % 6 < 3]
    assert train == [3, 9, 15, 21]  # three of validation after three of training
    assert sum(model.hooked) == 4 + 5


def test_defaults():
    hook = RuntimeBenchmarkHook()
    assert hook.every == dict(train=50, val=10, test=10)
    assert hook.warmup_iters == 10
    assert hook.priority == 'LOWEST'


@pytest.mark.parametrize('napping', [name for name in TRAIN_PHASES if name != 'other'])
def test_each_phase_of_training(tmp_path, napping):
    loop = dict(by_epoch=True, max_epochs=1)
    options = dict(loop=loop, interval=1, warmup_iters=1)
    runner = trained(tmp_path, naps={napping: NAP_MS}, **options)
    assert len(samples(runner)) == 2
    for sample in samples(runner):
        phases = sample['phases_ms']
        assert list(phases) == TRAIN_PHASES
        expected = dict.fromkeys(TRAIN_PHASES, 0.0) | {napping: NAP_MS}
        assert phases == pytest.approx(expected)
        times = dict(forward_ms=0.0, backward_ms=0.0, calls=1)
        if f'{napping}_ms' in times:
            times[f'{napping}_ms'] = NAP_MS
        assert sample['modules']['NapAttention'] == pytest.approx(times)
        assert sample['total_ms'] == naps()


def test_phases_are_the_whole_iteration(tmp_path):
    """Against mmengine's own measure."""
    naps = dict(zip(TRAIN_PHASES, range(1, 8), strict=True), other=0)
    loop = dict(by_epoch=True, max_epochs=1)
    runner = trained(tmp_path, naps=naps, loop=loop, interval=1, warmup_iters=1)
    theirs = runner.message_hub.get_scalar('train/time').data[0][1:] * 1e3
    assert [s['total_ms'] for s in samples(runner)] == pytest.approx(list(theirs))
    for sample in samples(runner):
        assert sample['phases_ms'] == pytest.approx(naps)


def test_phases_of_validation_and_testing(tmp_path):
    naps = dict(preprocess=NAP_MS, evaluator=NAP_MS)
    runner = make_runner(tmp_path, naps=naps, eval_interval=1)
    runner.val()
    runner.test()
    assert samples(runner, 'train') == []
    for mode in ('val', 'test'):
        (sample,) = samples(runner, mode)
        assert list(sample['phases_ms']) == EVAL_PHASES
        expected = dict.fromkeys(EVAL_PHASES, 0.0) | naps
        assert sample['phases_ms'] == pytest.approx(expected)
        assert sample['modules']['NapAttention']['backward_ms'] == 0.0
    assert_clean_model(runner.model)


def assert_clean_model(model) -> None:
    assert not any(module._forward_hooks for module in model.modules())
    assert not {'val_step', 'test_step'} & set(vars(model))


def test_validation_is_no_data_time_of_the_next_iteration(tmp_path):
    loop = dict(by_epoch=False, max_iters=3, val_interval=1)
    runner = trained(
        tmp_path, naps=dict(evaluator=NAP_MS), loop=loop, interval=1, warmup_iters=0
    )
    assert [s['iter'] for s in samples(runner)] == [1, 2, 3]
    assert [s['phases_ms']['data'] for s in samples(runner)] == [0, 0, 0]


@pytest.mark.parametrize(
    'optim',
    [
        dict(),
        dict(clip_grad=dict(max_norm=0.1)),
        dict(accumulative_counts=2),
        dict(type='BFloat16OptimWrapper'),
    ],
)
def test_training_is_the_same_to_the_bit(tmp_path, optim):
    options = dict(naps=dict(backward=NAP_MS), optim=optim)
    timed = trained(tmp_path / 'timed', **options, interval=1, warmup_iters=0)
    plain = trained(tmp_path / 'plain', optim=optim, benchmark=None)
    assert timed.model.losses == plain.model.losses
    assert_same_weights(timed, plain)
    assert_clean(timed)
    for sample in samples(timed):
        assert sample['phases_ms']['backward'] == naps()


def test_gradient_accumulation_is_sampled_at_every_place(tmp_path):
    optim = dict(accumulative_counts=2)
    nap = dict(optimizer=NAP_MS, forward=NAP_MS)
    runner = trained(tmp_path, naps=nap, optim=optim, interval=2, warmup_iters=0)
    assert report(runner)['every']['train'] == 3
    assert [s['iter'] for s in samples(runner)] == [1, 4, 7, 10]
    times = [s['phases_ms']['optimizer'] for s in samples(runner)]
    assert times == pytest.approx([0, NAP_MS, 0, NAP_MS])
    share = report(runner)['summary']['train']['phases']['optimizer']['share']
    assert share == pytest.approx(1 / 3)


class TwoOptimizers(NapModel):
    """Makes its step itself, as generative models do."""

    def train_step(self, data, optim_wrapper):
        data = self.data_preprocessor(data, True)
        for name in ('attention', 'head'):
            loss = self(**data, mode='loss')['loss']
            optim_wrapper[name].update_params(loss)
        return dict(loss=loss)


def test_several_optimizers(tmp_path):
    model = TwoOptimizers(preprocess=NAP_MS, forward=NAP_MS, backward=NAP_MS)
    runner = make_runner(tmp_path, model=model, interval=1)
    runner.optim_wrapper = OptimWrapperDict(
        **{
            name: OptimWrapper(
                NapSGD(getattr(model, name).parameters(), lr=0.1, nap_ms=NAP_MS)
            )
            for name in ('attention', 'head')
        }
    )
    runner.train()
    for sample in samples(runner):
        phases = sample['phases_ms']
        assert phases['preprocess'] == naps()
        for name in ('forward', 'backward', 'optimizer'):
            assert phases[name] == naps(2)
        assert sample['modules']['NapAttention']['calls'] == 2
    for wrapper in runner.optim_wrapper.values():
        assert not {'backward', 'step', 'zero_grad'} & set(vars(wrapper))


class FirstOfTwo(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return [samples[0] for samples in data_samples_list]


class Doubled(Hook):
    """Gives the model two views of the batch, as a pipeline with TTA does."""

    def before_test_iter(self, runner, batch_idx, data_batch=None):
        data_batch['inputs'] = [data_batch['inputs'], data_batch['inputs']]


def test_test_time_augmentation(tmp_path):
    model = FirstOfTwo(NapModel(forward=NAP_MS))
    runner = make_runner(tmp_path, model=model, hooks=(Doubled(),))
    runner.test()
    (sample,) = samples(runner, 'test')
    assert report(runner)['modules'] == {'NapAttention': ['attention']}
    assert sample['modules']['NapAttention']['calls'] == 2
    assert sample['phases_ms']['forward'] == naps(2)


def test_data_parallel_model(tmp_path):
    from mmengine.model import MMDistributedDataParallel

    store = f'file://{tmp_path / "store"}'
    torch.distributed.init_process_group('gloo', store, rank=0, world_size=1)
    try:
        model = MMDistributedDataParallel(
            NapModel(preprocess=NAP_MS, forward=NAP_MS), device_ids=None
        )
        runner = trained(tmp_path, model=model, interval=1)
    finally:
        torch.distributed.destroy_process_group()
    assert report(runner)['modules'] == {'NapAttention': ['attention']}
    for mode in ('train', 'val'):
        for sample in samples(runner, mode):
            assert sample['phases_ms']['preprocess'] == naps()
            assert sample['phases_ms']['forward'] == naps()
    assert_clean(runner)


def test_other_processes_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_benchmark_hook, 'is_main_process', lambda: False)
    runner = trained(tmp_path)
    assert not any(runner.model.hooked)
    assert not list(tmp_path.rglob('runtime_benchmark*'))


# Interruptions


class Interrupt(Hook):
    def __init__(self, place: str, iteration: int) -> None:
        self.place, self.iteration = place, iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration and self.place == 'step':
            data_batch['inputs'] = None  # the model cannot stack this

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.iteration and self.place == 'after':
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ('place', 'error'), [('step', TypeError), ('after', KeyboardInterrupt)]
)
def test_interrupted_training(tmp_path, place, error):
    """The second sampled iteration, in the second epoch."""
    runner = make_runner(tmp_path, hooks=(Interrupt(place, 5),))
    with pytest.raises(error):
        runner.train()
    assert_clean(runner)
    assert [s['iter'] for s in samples(runner)] == [3]


class StopBeforeStep(Hook):
    priority = 'LOWEST'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        raise KeyboardInterrupt


def test_interrupted_before_the_step(tmp_path):
    """What stands in for the step goes with the next run at the latest."""
    runner = make_runner(tmp_path, warmup_iters=0)
    runner.register_hook(StopBeforeStep(), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert 'train_step' in vars(runner.model)
    runner.val()
    assert_clean(runner)


def test_saves_from_time_to_time_within_an_epoch(tmp_path):
    """At most once a minute."""
    runner = make_runner(
        tmp_path,
        naps=dict(data=25e3),
        hooks=(Interrupt('step', 5),),
        loop=dict(by_epoch=True, max_epochs=1),
        batches=6,
        interval=1,
        warmup_iters=0,
    )
    with pytest.raises(TypeError):
        runner.train()
    assert [s['iter'] for s in samples(runner)] == [1, 2, 3]


def test_own_step_of_a_model_is_kept(tmp_path):
    """As a compiled one is."""
    runner = make_runner(tmp_path)
    calls = []

    def own_step(*args, **kwargs):
        calls.append(1)
        return BaseModel.train_step(runner.model, *args, **kwargs)

    runner.model.train_step = own_step
    runner.train()
    assert len(calls) == 12
    assert vars(runner.model)['train_step'] is own_step


def test_config():
    """The base builds the hook, with its own defaults."""
    path = Path(__file__).parents[3] / 'configs/_base_/runtime_benchmark.py'
    (options,) = Config.fromfile(path).custom_hooks
    hook = HOOKS.build(options)
    assert isinstance(hook, RuntimeBenchmarkHook)
    assert hook.every == RuntimeBenchmarkHook().every


# Options and modules


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(interval=0), ValueError, 'interval must be at least 1, got 0'),
        (
            dict(interval=2.5),
            TypeError,
            'interval must be an integer, got 2.5 of type float',
        ),
        (
            dict(interval=True),
            TypeError,
            'interval must be an integer, got True of type bool',
        ),
        (
            dict(eval_interval=-1),
            ValueError,
            'eval_interval must be at least 1, got -1',
        ),
        (dict(warmup_iters=-1), ValueError, 'warmup_iters must be at least 0, got -1'),
        (
            dict(warmup_iters='9'),
            TypeError,
            "warmup_iters must be an integer, got '9' of type str",
        ),
        (
            dict(log_scalars=1),
            TypeError,
            'log_scalars must be a bool, got 1 of type int',
        ),
        (dict(out_dir=3), TypeError, 'out_dir must be a str or a Path, got 3'),
        (
            dict(out_dir='s3://bucket'),
            ValueError,
            "out_dir must be a local folder, got 's3://bucket'",
        ),
        (
            dict(modules=['FPN']),
            TypeError,
            "modules must be a dict such as {'neck': 'FPN'}, got ['FPN']",
        ),
        (
            dict(modules=dict(neck=3)),
            TypeError,
            "modules['neck'] must be a class name, a path of a module, or a list of "
            'them, got 3',
        ),
        (
            dict(modules=dict(neck=['FPN', None])),
            TypeError,
            "modules['neck'] must be a class name, a path of a module, or a list of "
            "them, got ['FPN', None]",
        ),
        (
            dict(modules=dict(neck=[])),
            ValueError,
            "modules['neck'] must name a module, got []",
        ),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error) as info:
        RuntimeBenchmarkHook(**options)
    assert str(info.value) == message


def test_unknown_modules_are_found_before_training(tmp_path):
    runner = make_runner(tmp_path, modules=dict(good='head', bad=['head', 'neck']))
    with pytest.raises(ValueError, match=r"modules\['bad'\]: .* at 'neck'") as info:
        runner.train()
    assert "'attention', 'dropout', 'head'" in str(info.value)
    assert runner.model.losses == []


def test_chosen_modules(tmp_path):
    groups = dict(linear=['Linear', 'head'], all=['attention', 'attention.linear'])
    runner = trained(tmp_path, naps=dict(forward=NAP_MS), modules=groups)
    assert report(runner)['modules'] == dict(
        linear=['attention.linear', 'head'], all=['attention', 'attention.linear']
    )
    for sample in samples(runner):
        assert sample['modules']['linear']['calls'] == 2
        assert sample['modules']['linear']['forward_ms'] == 0
        assert sample['modules']['all']['forward_ms'] == naps()


def test_model_without_attention_warns(tmp_path):
    class Plain(NapModel):
        def __init__(self):
            super().__init__()
            self.attention = nn.Linear(4, 4)

    runner = make_runner(tmp_path, model=Plain())
    warnings = []
    runner.logger.warning = warnings.append
    runner.train()
    assert any('no attention modules' in text for text in warnings)
    assert samples(runner)[0]['modules'] == {}


class Exchange(Hook):
    """Another attention from the second epoch on."""

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            runner.model.attention = nn.MultiheadAttention(4, 1)
            runner.model.attention.forward = lambda x: x


def test_modules_that_another_hook_exchanges(tmp_path):
    runner = trained(tmp_path, hooks=(Exchange(),))
    names = [list(s['modules']) for s in samples(runner)]
    assert names == [['NapAttention']] + 3 * [['MultiheadAttention']]
    assert set(report(runner)['summary']['train']['modules']) == {
        'NapAttention',
        'MultiheadAttention',
    }


# Outputs


def logged_scalars(runner) -> list[dict]:
    lines = Path(runner.log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r for r in records if any(name.startswith('runtime/') for name in r)]


def test_scalars_reach_the_visualizer(tmp_path):
    runner = trained(tmp_path)
    first = next(r for r in logged_scalars(runner) if 'runtime/train/total_ms' in r)
    sample = samples(runner)[0]
    assert first['step'] == 3
    assert first['runtime/train/total_ms'] == sample['total_ms']
    for name in TRAIN_PHASES:
        assert first[f'runtime/train/{name}_ms'] == sample['phases_ms'][name]
    times = sample['modules']['NapAttention']
    for name in ('forward_ms', 'backward_ms'):
        assert first[f'runtime/train/NapAttention/{name}'] == times[name]
    of_val = [r for r in logged_scalars(runner) if 'runtime/val/total_ms' in r]
    assert [r['step'] for r in of_val] == [3, 5, 7, 9, 11]
    assert 'runtime/val/NapAttention/backward_ms' not in of_val[0]


def test_scalars_can_be_left_out(tmp_path):
    runner = trained(tmp_path, log_scalars=False)
    assert len(samples(runner)) == 4
    assert not Path(runner.log_dir, 'vis_data', 'scalars.json').exists() or (
        logged_scalars(runner) == []
    )


def test_files(tmp_path):
    runner = trained(tmp_path, naps=dict(data=5.0, forward=10.0, backward=20.0))
    run = report(runner)
    assert run['name'] == runner.experiment_name
    assert run['environment']['torch'] == torch.__version__
    assert run['environment']['world_size'] == 1
    assert run['warmup_iters'] == 2
    summary = run['summary']['train']
    assert summary['count'] == 4
    assert sum(x['share'] for x in summary['phases'].values()) == pytest.approx(1)
    assert summary['total']['median_ms'] == pytest.approx(35)
    text = Path(runner.log_dir, 'runtime_benchmark.md').read_text()
    assert '### train: 4 sampled iterations, one in 3' in text
    assert '| phase | median ms | p20 - p80 ms | mean ms | share of iteration |' in text
    for name in (*TRAIN_PHASES, 'evaluator'):
        assert f'\n| {name} | ' in text
    cells = '20.0 | 20.0 - 20.0 | 20.0 | 57.1 %'
    assert f'\n| NapAttention | 1 | backward | {cells} |' in text
    assert '### test' not in text
    assert not list(Path(runner.log_dir).glob('*.part'))


def test_out_dir_keeps_earlier_runs(tmp_path):
    out_dir = tmp_path / 'out'
    runners = [trained(tmp_path / x, out_dir=str(out_dir)) for x in ('a', 'b')]
    runners[1].test()  # belongs to the run of its training
    record = json.loads((out_dir / 'runtime_benchmark.json').read_text())
    assert [run['name'] for run in record['runs']] == [
        runner.experiment_name for runner in runners
    ]
    assert [len(run['samples']['test']) for run in record['runs']] == [0, 1]
    text = (out_dir / 'runtime_benchmark.md').read_text()
    places = [text.index(runner.experiment_name) for runner in runners]
    assert places[0] > places[1]  # the newest on top


@pytest.mark.parametrize('content', ['{', '[]', '{"format_version": 7, "runs": []}'])
def test_other_files_are_not_overwritten(tmp_path, content):
    path = tmp_path / 'runtime_benchmark.json'
    path.write_text(content)
    runner = make_runner(tmp_path / 'run', out_dir=tmp_path)
    with pytest.raises(ValueError, match=r'runtime_benchmark\.json is no'):
        runner.train()
    assert path.read_text() == content


def test_nothing_sampled(tmp_path):
    runner = trained(tmp_path, warmup_iters=100)
    assert samples(runner) == []
    text = Path(runner.log_dir, 'runtime_benchmark.md').read_text()
    assert 'No iteration was sampled.' in text


def test_modules_without_calls_are_named(tmp_path):
    model = NapModel()
    model.idle = nn.Linear(1, 1)
    runner = trained(tmp_path, model=model, modules=dict(busy='head', lazy='idle'))
    text = Path(runner.log_dir, 'runtime_benchmark.md').read_text()
    assert '\nNever called, or called without hooks: lazy.\n' in text


@pytest.mark.cuda
@pytest.mark.parametrize('kind', ['OptimWrapper', 'AmpOptimWrapper'])
def test_on_a_gpu(tmp_path, kind, monkeypatch):
    monkeypatch.undo()  # events tell real time
    runner = trained(tmp_path, optim=dict(type=kind), interval=1)
    for sample in samples(runner):
        phases = sample['phases_ms']
        assert min(phases[name] for name in STEP_PHASES) > 0
        assert sum(phases.values()) == pytest.approx(sample['total_ms'], rel=0.2)
        assert sample['modules']['NapAttention']['backward_ms'] > 0
    assert_clean(runner)


def test_folder_that_cannot_be_written_is_found_before_training(tmp_path):
    (tmp_path / 'file').touch()
    runner = make_runner(tmp_path / 'run', out_dir=str(tmp_path / 'file' / 'folder'))
    with pytest.raises(OSError, match=r'file/folder/runtime_benchmark\.json'):
        runner.train()
    assert runner.iter == 0


def test_training_outlives_a_full_disk(tmp_path, monkeypatch):
    put = AtomicLocalBackend.put
    full = []

    def put_if_there_is_room(self, obj, filepath):
        if full:
            raise OSError(errno.ENOSPC, 'No space left on device', str(filepath))
        put(self, obj, filepath)

    monkeypatch.setattr(AtomicLocalBackend, 'put', put_if_there_is_room)
    hook = Hook()
    hook.after_train_epoch = full.append
    runner = make_runner(tmp_path, hooks=(hook,))
    warnings = []
    runner.logger.warning = warnings.append
    runner.train()
    assert runner.epoch == 4
    assert sum('not saved: [Errno 28] No space' in text for text in warnings) > 1
