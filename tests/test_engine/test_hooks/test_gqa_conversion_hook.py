"""Uptraining with GQAConversionHook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseTTAModel
from tiny_uptraining import ARCH, TinyModel, WeightsHook, make_runner

from deform_gqa.conversion import convert_state_dict
from deform_gqa.engine import GQAConversionHook
from deform_gqa.models import DAT

pytestmark = pytest.mark.usefixtures('one_thread')
HOOK = dict(type='GQAConversionHook')


@pytest.fixture(scope='module')
def trained():
    """The state_dict of a multi-head model."""
    torch.manual_seed(5)
    model = TinyModel()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.state_dict()


@pytest.fixture
def checkpoint(tmp_path, trained):
    path = tmp_path / 'trained.pth'
    torch.save(dict(state_dict=trained), path)
    return str(path)


@pytest.fixture
def converted(trained):
    return convert_state_dict(trained, TinyModel(1))[0]


def assert_equal(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def train(work_dir, *hooks, **options):
    """The runner after training, and the weights that it started with."""
    weights = WeightsHook()
    runner = make_runner(work_dir, custom_hooks=[*hooks, weights], **options)
    runner.train()
    return runner, weights.start


@pytest.mark.parametrize(
    'wrapper', ['OptimWrapper', 'BFloat16OptimWrapper'], ids=['fp32', 'amp']
)
def test_training_starts_with_converted_weights_and_changes_them(
    tmp_path, checkpoint, converted, wrapper
):
    runner, start = train(
        tmp_path / 'run', HOOK, load_from=checkpoint, optim_wrapper=dict(type=wrapper)
    )
    assert_equal(start, converted)
    end = runner.model.state_dict()
    for name in converted:
        if name.endswith('proj_v.weight') or name.endswith('qkv.weight'):
            assert not torch.equal(end[name], converted[name]), name
    [report] = Path(runner.log_dir).glob('head_conversion/*.json')
    assert len(json.loads(report.read_text())['layers']) == 4


def test_init_cfg_gives_the_same_weights(tmp_path, trained, converted):
    path = tmp_path / 'trained.pth'
    torch.save(dict(model=trained), path)
    backbone = DAT(
        ARCH,
        1,
        out_indices=(3,),
        init_cfg=dict(type='Pretrained', checkpoint=str(path), convert_heads='mean'),
    )
    backbone.init_weights()
    assert_equal(
        {f'backbone.{n}': x for n, x in backbone.state_dict().items()}, converted
    )


def test_average_starts_with_converted_weights(tmp_path, checkpoint, converted):
    """EMAHook copies the weights of the checkpoint, and is registered first."""
    weights = WeightsHook()
    hooks = [dict(type='EMAHook'), HOOK, weights]
    make_runner(tmp_path, load_from=checkpoint, custom_hooks=hooks).train()
    assert_equal(weights.start, converted)
    assert_equal(weights.average, converted)
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    shapes = {name: x.shape for name, x in saved['state_dict'].items()}
    assert shapes == {name: x.shape for name, x in converted.items()}


def test_resuming_leaves_the_checkpoint_alone(tmp_path, checkpoint):
    whole, _ = train(tmp_path / 'whole', HOOK, load_from=checkpoint)
    resumed, _ = train(
        tmp_path / 'part',
        HOOK,
        load_from=str(tmp_path / 'whole' / 'epoch_1.pth'),
        resume=True,
    )
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())


def test_converted_checkpoints_stay_as_they_are(tmp_path, converted):
    path = tmp_path / 'converted.pth'
    torch.save(dict(state_dict=converted), path)
    runner, start = train(tmp_path / 'run', HOOK, load_from=str(path))
    assert_equal(start, converted)
    assert not list(Path(runner.log_dir).glob('head_conversion'))


def test_processes_start_and_end_with_the_same_weights(tmp_path, checkpoint):
    environment = dict(
        os.environ,
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT='29517',
        WORLD_SIZE='2',
        CUDA_VISIBLE_DEVICES='',
        OMP_NUM_THREADS='1',
    )
    script = Path(__file__).with_name('tiny_uptraining.py')
    processes = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, checkpoint],
            env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in range(2))
    assert_equal(first['start'], second['start'])
    assert_equal(first['end'], second['end'])
    name = 'backbone.stages.3.attns.0.proj_v.weight'
    assert first['start'][name].shape == (2, 8, 1, 1)
    assert not torch.equal(first['start'][name], first['end'][name])


def test_calibration_images_lower_the_error(tmp_path, checkpoint):
    errors = []
    for refit in (False, True):
        hook = dict(HOOK, calibrate=3, refit_output=refit)
        runner, _ = train(tmp_path / f'run_{refit}', hook, load_from=checkpoint)
        [report] = Path(runner.log_dir).glob('head_conversion/*.json')
        layers = json.loads(report.read_text())['layers']
        errors.append([layer['error'] for layer in layers])
    assert all(after < before for before, after in zip(*errors, strict=True))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(extra=torch.ones(1)), 'keys that TinyModel does not have: extra'),
        (
            {'backbone.patch_proj.0.weight': torch.ones(1)},
            r'backbone.patch_proj.0.weight has shape \(1,\), expected \(4, 3, 3, 3\)',
        ),
    ],
    ids=['unknown key', 'other shape'],
)
def test_checkpoints_that_do_not_fit(tmp_path, trained, change, message):
    path = tmp_path / 'other.pth'
    torch.save(dict(state_dict=dict(trained) | change), path)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / 'run', HOOK, load_from=str(path))
    hook = dict(HOOK, ignore=list(change))
    train(tmp_path / 'ignored', hook, load_from=str(path))


def start_test(tmp_path, model, path, hook):
    """Loads a checkpoint as a test does."""
    runner = make_runner(
        tmp_path / 'test', model=model, load_from=str(path), custom_hooks=[hook]
    )
    runner.load_or_resume()
    return runner.model.state_dict()


def test_tested_checkpoints_are_loaded_whole(tmp_path, converted):
    """What training does not start with is part of what it ends with."""
    path = tmp_path / 'uptrained.pth'
    torch.save(dict(state_dict=converted), path)
    hook = dict(HOOK, ignore=['patch_proj'])
    assert_equal(start_test(tmp_path, TinyModel(1), path, hook), converted)


class Augmented(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list[0]


def test_models_with_test_time_augmentation(tmp_path, checkpoint, converted):
    model = Augmented(TinyModel(1))
    state = start_test(tmp_path, model, checkpoint, HOOK)
    expected = {f'module.{name}': x for name, x in converted.items()}
    assert_equal(state, expected)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(calibrate=-1), ValueError, 'calibrate must be at least 0, got -1'),
        (dict(calibrate=1.5), TypeError, 'calibrate must be an integer'),
        (dict(refit_output=1), TypeError, 'refit_output must be a bool'),
        (dict(seed=-1), ValueError, 'seed must be at least 0, got -1'),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        GQAConversionHook(**options)
