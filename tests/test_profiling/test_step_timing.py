import pytest
import torch
from torch import nn

from deform_gqa.profiling.step_timing import (
    SampledStep,
    StepTimer,
    replace_method,
    wrapped_models,
)

CPU = torch.device('cpu')


class Wrapper:
    """As an optimizer wrapper."""

    def backward(self, loss):
        loss.backward()

    def step(self):
        raise ZeroDivisionError

    def zero_grad(self):
        pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.data_preprocessor = nn.Identity()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x).sum()

    def train_step(self, x, wrapper, fail=False):
        wrapper.backward(self(self.data_preprocessor(x)))
        if fail:
            wrapper.step()
        wrapper.zero_grad()
        return 'done'


def installed(model, wrapper) -> bool:
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return hooks or bool(vars(wrapper)) or 'train_step' in vars(model)


def test_step():
    model, wrapper = Model(), Wrapper()
    timer = StepTimer(model, CPU, {'linear': [model.linear]}, [wrapper])
    step = SampledStep(model, 'train_step', timer)
    assert installed(model, wrapper)
    assert step.time is None
    assert model.train_step(torch.ones(2), wrapper) == 'done'
    assert not installed(model, wrapper)
    parts = step.time.parts_ms
    assert list(parts) == ['preprocess', 'forward', 'backward', 'optimizer', 'other']
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(step.time.total_ms)
    assert step.time.modules['linear'].calls == 1
    assert 0 < step.time.modules['linear'].forward_ms < parts['forward']


def test_failing_step_leaves_nothing():
    model, wrapper = Model(), Wrapper()
    step = SampledStep(model, 'train_step', StepTimer(model, CPU, {}, [wrapper]))
    with pytest.raises(ZeroDivisionError):
        model.train_step(torch.ones(2), wrapper, fail=True)
    assert not installed(model, wrapper)
    assert step.time is None


def test_step_that_is_not_made():
    model, wrapper = Model(), Wrapper()
    step = SampledStep(model, 'train_step', StepTimer(model, CPU, {}, [wrapper]))
    for _ in range(2):
        step.remove()
        assert not installed(model, wrapper)


def test_method_of_an_object_alone_comes_back():
    wrapper, calls = Wrapper(), []
    wrapper.step = lambda: calls.append('own')
    restore = replace_method(wrapper, 'step', lambda: calls.append('ours'))
    wrapper.step()
    restore()
    wrapper.step()
    assert calls == ['ours', 'own']


def test_wrapped_models():
    inner = Model()
    outer, outermost = nn.Module(), nn.Module()
    outer.module, outermost.module = inner, outer
    assert list(wrapped_models(outermost)) == [outermost, outer, inner]


def test_unknown_device():
    with pytest.raises(ValueError, match="got 'meta'"):
        StepTimer(Model(), torch.device('meta'), {})
