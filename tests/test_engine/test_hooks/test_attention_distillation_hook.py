import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset

from deform_gqa.engine import AttentionDistillationHook, load_checkpoint
from deform_gqa.engine.hooks.attention_distillation_hook import (
    LOSS_NAME,
    relative_error,
)
from deform_gqa.models import DAT

ARCH = dict(
    embed_dims=(8,) * 4,
    depths=(1,) * 4,
    num_heads=(4,) * 4,
    block_types=('X', 'N', 'N', 'D'),
    table_sizes=(8,) * 4,
)
ATTENTION = [f'backbone.stages.{stage}.attns.0' for stage in (1, 2, 3)]
NUMBERS = itertools.count()


class TinyDetector(BaseModel):
    """A DAT and a head that learns to give zeros."""

    def __init__(self, kv_heads: int = 1, with_cp: bool = False) -> None:
        super().__init__()
        self.backbone = DAT(ARCH, kv_heads, with_cp=with_cp, out_indices=(3,))
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        out = self.head(self.backbone(inputs)[0])
        return dict(loss=out.square().mean()) if mode == 'loss' else [out]


class Images(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randn(3, 32, 48, generator=generator))


def images():
    return torch.stack([Images()[index]['inputs'] for index in range(2)])


@pytest.fixture(autouse=True)
def _registered():
    MODELS.register_module(module=TinyDetector, force=True)
    yield
    MODELS.module_dict.pop('TinyDetector')


@pytest.fixture
def teacher(tmp_path):
    """A multi-head detector, and the options that stand for it."""
    torch.manual_seed(1)
    model = TinyDetector(kv_heads=4).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'teacher.pth')
    options = dict(
        teacher_config=dict(model=dict(type='TinyDetector', kv_heads=4)),
        teacher_ckpt=str(tmp_path / 'teacher.pth'),
    )
    return SimpleNamespace(model=model, options=options)


def student(**options) -> TinyDetector:
    torch.manual_seed(2)
    return TinyDetector(**options)


def listen(model, teacher, **options) -> AttentionDistillationHook:
    hook = AttentionDistillationHook(**teacher.options, **options)
    hook.before_train(SimpleNamespace(model=model))
    return hook


def outputs(model, layers) -> list:
    """What the modules return for the images."""
    kept = []
    modules = dict(model.named_modules())
    for name in layers:
        modules[name].register_forward_hook(lambda m, args, out: kept.append(out))
    model(images())
    return kept


def distillation_loss(model) -> torch.Tensor:
    return model(images(), mode='loss')[LOSS_NAME]


def distillation_grads(model) -> list:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(
        distillation_loss(model), parameters, materialize_grads=True
    )


def test_relative_error():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected, expected) == 0
    assert_close(relative_error(torch.zeros(2), expected), torch.tensor(1.0))
    assert_close(relative_error(torch.tensor([3.0, 3.0]), expected), torch.tensor(0.04))
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    # the squares overflow float16
    actual, expected = (torch.tensor([x]).half() for x in (500.0, 1000.0))
    assert_close(relative_error(actual, expected), torch.tensor(0.25))


@pytest.mark.parametrize('layers', [None, ATTENTION[1:], [ATTENTION[2], 'head']])
def test_loss_is_the_mean_error_of_the_layers(teacher, layers):
    names = ATTENTION if layers is None else layers
    ours, theirs = outputs(student(), names), outputs(teacher.model, names)
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    model = student()
    plain = model(images(), mode='loss')
    listen(model, teacher, loss_weight=3.0, layers=layers)
    losses = model(images(), mode='loss')
    assert losses.keys() == {'loss', LOSS_NAME}
    assert_close(losses['loss'], plain['loss'])
    assert_close(losses[LOSS_NAME], 3 * torch.stack(errors).mean())
    assert losses[LOSS_NAME] > 0.1


def test_a_model_that_equals_its_teacher_has_no_loss(teacher):
    listen(teacher.model.train(), teacher)
    assert distillation_loss(teacher.model) < 1e-12


def test_the_loss_trains_attention_and_what_lies_before_it(teacher):
    model = student()
    hook = listen(model, teacher)
    names = [name for name, _ in model.named_parameters()]
    moved = {
        n for n, g in zip(names, distillation_grads(model), strict=True) if g.any()
    }
    assert {f'{ATTENTION[2]}.proj_k.weight', 'backbone.patch_proj.0.weight'} <= moved
    assert 'head.weight' not in moved
    assert not any(p.requires_grad for p in hook._teacher.parameters())
    assert not hook._teacher.training


def test_activation_checkpointing_changes_nothing(teacher):
    plain, checkpointed = student(), student(with_cp=True)
    for model in (plain, checkpointed):
        listen(model, teacher)
    assert_close(distillation_grads(checkpointed), distillation_grads(plain))


def test_autocast(teacher):
    model = student()
    listen(model, teacher)
    exact = distillation_loss(model)
    with torch.autocast('cpu', torch.bfloat16):
        loss = distillation_loss(model)
    assert loss.dtype == torch.float32
    assert_close(loss, exact, atol=0, rtol=0.02)
    loss.backward()


def test_predictions_do_not_run_the_teacher(teacher):
    model = student()
    hook = listen(model, teacher)
    ran = []
    hook._teacher.backbone.register_forward_hook(lambda *_: ran.append(1))
    model(images(), mode='tensor')
    model.eval()
    assert LOSS_NAME not in model(images(), mode='loss')
    assert not ran
    distillation_loss(model.train())
    assert ran


def test_distributed_wrapper(tmp_path, teacher):
    plain, model = student(), student()
    listen(plain, teacher)
    expected = plain(images(), mode='loss')
    sum(expected.values()).backward()
    store = f'file://{tmp_path / "store"}'
    torch.distributed.init_process_group('gloo', store, rank=0, world_size=1)
    try:
        wrapped = MMDistributedDataParallel(model, device_ids=None)
        listen(wrapped, teacher)
        losses = wrapped(images(), mode='loss')
        sum(losses.values()).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_close(losses, expected)
    assert_close(
        [p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]
    )


# Whole trainings


class BreakError(Exception):
    pass


class BreakHook(Hook):
    def before_train_epoch(self, runner) -> None:
        if runner.epoch == 2:
            raise BreakError


def make_runner(work_dir, teacher, *hooks, resume=False) -> Runner:
    """Four epochs of two iterations, with a moving average."""
    loader = dict(
        batch_size=2,
        num_workers=0,
        dataset=Images(),
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
    )
    distillation = dict(type='AttentionDistillationHook', **teacher.options)
    return Runner(
        model=student(),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=4),
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.01)),
        default_hooks=dict(checkpoint=dict(type='ResumableCheckpointHook', interval=1)),
        custom_hooks=[dict(type='EMAHook'), distillation, *hooks],
        randomness=dict(seed=3),
        resume=resume,
        experiment_name=f'distillation_{next(NUMBERS)}',
        log_level='ERROR',
    )


def test_training(tmp_path, teacher):
    before = distillation_loss_of(student(), teacher)
    whole = make_runner(tmp_path / 'whole', teacher)
    whole.train()

    # the teacher is in no checkpoint, and nothing of it is left on the model
    last = load_checkpoint(tmp_path / 'whole' / 'epoch_4.pth')
    assert last['state_dict'].keys() == student().state_dict().keys()
    assert not any('teacher' in name for name in last['ema_state_dict'])
    for module in whole.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert distillation_loss_of(whole.model, teacher) < before / 2

    # a resumed run ends with the same bits
    with pytest.raises(BreakError):
        make_runner(tmp_path / 'broken', teacher, BreakHook()).train()
    assert not Path(tmp_path / 'broken' / 'epoch_3.pth').exists()
    make_runner(tmp_path / 'broken', teacher, resume=True).train()
    resumed = load_checkpoint(tmp_path / 'broken' / 'epoch_4.pth')
    for key in ('state_dict', 'ema_state_dict'):
        for name, value in last[key].items():
            assert torch.equal(value, resumed[key][name]), name


def distillation_loss_of(model, teacher) -> float:
    hook = listen(model, teacher)
    loss = distillation_loss(model).item()
    hook.after_train(SimpleNamespace(model=model))
    return loss


# Mistakes


@pytest.mark.parametrize(
    'option, error, message',
    [
        (dict(teacher_config=3), TypeError, 'teacher_config must be .* got 3'),
        (dict(teacher_ckpt=None), TypeError, 'teacher_ckpt must be a file, got None'),
        (dict(loss_weight='1'), TypeError, "loss_weight must be a number, got '1'"),
        (dict(loss_weight=0), ValueError, 'loss_weight must be above 0, got 0'),
        (dict(layers='head'), TypeError, "layers must be a list of .* got 'head'"),
        (dict(layers=[1]), TypeError, r'layers must be a list of paths, got \[1\]'),
        (dict(layers=[]), ValueError, 'layers must name a module'),
    ],
)
def test_options(option, error, message):
    options = dict(teacher_config='teacher.py', teacher_ckpt='teacher.pth')
    with pytest.raises(error, match=message):
        AttentionDistillationHook(**options | option)


def test_layers_that_do_not_exist(teacher):
    with pytest.raises(ValueError, match="the model has no module 'neck'"):
        listen(student(), teacher, layers=['neck'])
    model = student()
    model.neck = nn.Identity()
    with pytest.raises(ValueError, match="the teacher has no module 'neck'"):
        listen(model, teacher, layers=['neck'])
    model = BaseModel.__new__(TinyDetector)
    BaseModel.__init__(model)
    with pytest.raises(
        ValueError, match=r'no module of TinyDetector has .*num_kv_heads'
    ):
        listen(model, teacher)


def test_layers_whose_outputs_cannot_be_compared(teacher):
    model = student()
    listen(model, teacher, layers=['head'])
    model.head = nn.Conv2d(8, 1, 1)  # the module that is listened to does not run
    with pytest.raises(ValueError, match=r"the outputs of 'head' .* got \[\] and \[\("):
        model(images(), mode='loss')


def test_checkpoint_that_does_not_fit(teacher):
    teacher.options['teacher_config']['model']['kv_heads'] = 2
    with pytest.raises(ValueError, match=r'teacher.pth.* does not fit .*'):
        listen(student(), teacher)
