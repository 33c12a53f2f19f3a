import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from virtual_time import CLOCK, Nap, use_virtual_time

from deform_gqa.profiling import clock
from deform_gqa.profiling.clock import Clock, covered, make_clock
from deform_gqa.profiling.module_timing import (
    ModuleTimer,
    attention_groups,
    select_modules,
)

CPU = torch.device('cpu')
NAP_MS = 20.0


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch):
    use_virtual_time(monkeypatch, clock)


class NapAttention(nn.Module):
    """A linear map between two naps; takes and gives whatever structure."""

    def __init__(self, forward_ms=0.0, backward_ms=0.0, wrap=lambda x: x):
        super().__init__()
        self.forward_ms, self.backward_ms, self.wrap = forward_ms, backward_ms, wrap
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x = Nap.apply(self.linear(x), self.forward_ms, self.backward_ms)
        return self.wrap(x)


class SleepyMLP(nn.Module):
    """What must not be counted."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return Nap.apply(self.linear(x), 3 * NAP_MS, 3 * NAP_MS)


def measure(call, **groups):
    timer = ModuleTimer(groups, CPU)
    with timer:
        call()
    return timer.result()


def naps(count=1):
    return pytest.approx(count * NAP_MS)


def batch(requires_grad):
    return torch.randn(2, 4, requires_grad=requires_grad)


@pytest.mark.parametrize('requires_grad', [False, True])
@pytest.mark.parametrize('direction', ['forward', 'backward'])
def test_sleep_shows_in_its_direction(direction, requires_grad):
    expected = dict(forward_ms=0, backward_ms=0) | {f'{direction}_ms': NAP_MS}
    sleepy, quick = NapAttention(**expected), NapAttention()
    model = nn.Sequential(sleepy, SleepyMLP(), quick)
    x = batch(requires_grad)
    times = measure(lambda: model(x).sum().backward(), sleepy=[sleepy], quick=[quick])
    assert vars(times['sleepy']) == pytest.approx(dict(expected, calls=1))
    assert vars(times['quick']) == dict(forward_ms=0, backward_ms=0, calls=1)


@pytest.mark.parametrize('requires_grad', [False, True])
def test_several_calls_of_one_module(requires_grad):
    attention, mlp = NapAttention(NAP_MS, NAP_MS), SleepyMLP()
    x = batch(requires_grad)
    time = measure(
        lambda: attention(mlp(attention(x))).sum().backward(), both=[attention]
    )['both']
    assert time.calls == 2
    # without what lies between the calls
    assert time.forward_ms == naps(2)
    assert time.backward_ms == naps(2)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda x: (x, None),
        lambda x: [x.chunk(2)],
        lambda x: dict(out=x, size=4),
    ],
)
def test_structures_of_outputs(wrap):
    attention = NapAttention(backward_ms=NAP_MS, wrap=wrap)

    def call():
        out = attention(batch(True))
        while not isinstance(out, torch.Tensor):
            parts = list(out.values()) if isinstance(out, dict) else out
            out = parts[0]
        out.sum().backward()

    assert measure(call, a=[attention])['a'].backward_ms == naps()


def test_keyword_inputs():
    attention = NapAttention(backward_ms=NAP_MS)
    time = measure(lambda: attention(x=batch(True)).sum().backward(), a=[attention])
    assert time['a'].backward_ms == naps()


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('whole', [False, True])
def test_recomputation_is_part_of_backward(reentrant, whole):
    # recomputation stops where backward has what it needs: here after the nap
    attention = NapAttention(NAP_MS, NAP_MS, torch.sigmoid)
    tail = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    block = nn.Sequential(attention, *tail) if whole else attention
    x = batch(True)

    def call():
        tail(checkpoint(block, x, use_reentrant=reentrant)).sum().backward()

    time = measure(call, a=[attention])['a']
    assert time.calls == 1
    assert time.forward_ms == naps()
    assert time.backward_ms == naps(2)


def test_recomputation_that_stops_early():
    """It leaves the module by an exception once it has what backward needs."""
    attention = NapAttention(NAP_MS)
    attention.wrap = lambda x: x.sigmoid() + 1
    x = batch(True)
    timer = ModuleTimer({'a': [attention]}, CPU)
    for _ in range(2):
        with timer:
            checkpoint(attention, x, use_reentrant=False).sum().backward()
        time = timer.result()['a']
        assert time.calls == 1
        assert time.backward_ms == naps()


def test_no_gradients_no_backward():
    attention = NapAttention(NAP_MS)
    with torch.no_grad():
        time = measure(lambda: attention(batch(False)), a=[attention])['a']
    assert time.forward_ms == naps()
    assert (time.backward_ms, time.calls) == (0.0, 1)


def test_frozen_module_passes_gradients_on():
    attention = NapAttention(backward_ms=NAP_MS).requires_grad_(False)
    time = measure(lambda: attention(batch(True)).sum().backward(), a=[attention])['a']
    assert time.backward_ms == naps()


def test_module_that_makes_no_node():
    """Its output is what it got: there is no backward pass of its own."""
    mlp, identity = SleepyMLP(), nn.Identity()
    time = measure(lambda: identity(mlp(batch(True))).sum().backward(), a=[identity])
    assert time['a'].backward_ms == 0.0
    parameter = nn.Parameter(torch.ones(3))
    measure(lambda: identity(parameter).sum().backward(), a=[identity])
    assert not parameter._backward_hooks


def test_members_within_members_count_once():
    inner = NapAttention(NAP_MS, NAP_MS)
    outer = nn.Sequential(inner, nn.Linear(4, 4))
    times = measure(
        lambda: outer(batch(True)).sum().backward(), a=[outer, inner], b=[inner]
    )
    for group in times.values():
        assert group.forward_ms == naps()
        assert group.backward_ms == naps()


def grads_of(model, x, timer=None):
    torch.manual_seed(1)
    model.zero_grad()
    if timer is None:
        model(x).square().sum().backward()
    else:
        with timer:
            model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_results_are_the_same_to_the_bit():
    class SelfAttention(nn.MultiheadAttention):
        """torch takes another path when query, key and value are one tensor."""

        def forward(self, x):
            return super().forward(x, x, x)[0]

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), SelfAttention(8, 2, dropout=0.5), nn.ReLU(inplace=True)
    )
    x = torch.randn(3, 5, 8)
    plain = grads_of(model, x)
    timed = grads_of(model, x, ModuleTimer(attention_groups(model), CPU))
    assert all(torch.equal(a, b) for a, b in zip(plain, timed, strict=True))


def test_nothing_is_left_behind():
    attention = NapAttention()
    timer = ModuleTimer({'a': [attention]}, CPU)
    with pytest.raises(ZeroDivisionError), timer:
        attention(batch(True)).sum().backward()
        raise ZeroDivisionError
    for hooks in ('_forward_pre_hooks', '_forward_hooks', '_backward_hooks'):
        assert not getattr(attention, hooks)
    assert not attention._forward_hooks_always_called
    alive = weakref.ref(timer)
    del timer
    out = attention(batch(True))
    gc.collect()
    assert alive() is None
    for parameter in attention.parameters():
        assert not parameter._backward_hooks
    assert out.grad_fn is not None


def test_error_in_forward_keeps_the_timer_usable():
    attention = NapAttention(NAP_MS)
    attention.wrap = None  # not callable
    timer = ModuleTimer({'a': [attention]}, CPU)
    with timer:
        with pytest.raises(TypeError):
            attention(batch(True))
        attention.wrap = torch.sigmoid
        attention(batch(True))
    assert timer.result()['a'].calls == 2


def test_entered_twice():
    timer = ModuleTimer({'a': [nn.Identity()]}, CPU)
    with timer, pytest.raises(RuntimeError, match='active already'), timer:
        pass


def test_measures_anew_each_time():
    attention = NapAttention(NAP_MS)
    timer = ModuleTimer({'a': [attention]}, CPU)
    for _ in range(2):
        with timer:
            attention(batch(True))
        assert timer.result()['a'].calls == 1
        assert timer.result()['a'].forward_ms == naps()


def test_covered():
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (5.5, 6)]) == 5


def test_unknown_device():
    assert type(make_clock(CPU)) is Clock
    with pytest.raises(ValueError, match=r"device must be .* got 'meta'"):
        ModuleTimer({}, torch.device('meta'))


class MultiScaleDeformableAttention(nn.Module):
    """Named as mmcv's."""


class ShiftWindowMSA(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_msa = WindowMSA()


class WindowMSA(nn.Module):
    pass


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.swin = ShiftWindowMSA()
        self.encoder = nn.ModuleList(MultiScaleDeformableAttention() for _ in range(2))
        self.decoder = nn.MultiheadAttention(4, 2)
        self.attns = nn.ModuleList([nn.Conv2d(1, 1, 1)])
        self.neck = nn.Sequential(nn.Linear(1, 1), nn.ModuleDict({'a': nn.Identity()}))


def test_attention_groups():
    model = Detector()
    assert attention_groups(model) == {
        'ShiftWindowMSA': [model.swin],  # and not the WindowMSA inside it
        'MultiScaleDeformableAttention': list(model.encoder),
        'MultiheadAttention': [model.decoder],
        'Conv2d': [model.attns[0]],  # somebody's own class in a stage of DAT
    }
    assert attention_groups(nn.Linear(1, 1)) == {}
    attention = nn.MultiheadAttention(4, 2)
    assert attention_groups(attention) == {'MultiheadAttention': [attention]}


def test_attention_groups_of_dat():
    from mmdet.registry import MODELS

    import deform_gqa.models  # noqa: F401

    arch = dict(
        embed_dims=(8, 8, 8, 8),
        depths=(2, 2, 1, 1),
        num_heads=(1, 1, 1, 1),
        block_types=('NX', 'SD', 'D', 'D'),
        table_sizes=(8, 4, 2, 1),
    )
    model = MODELS.build(dict(type='DAT', arch=arch))
    names = ['NeighborhoodAttention', 'DepthwiseConv']
    names += ['ShiftedWindowAttention', 'DeformableGQA']
    assert list(attention_groups(model)) == names


def test_select_modules():
    model = Detector()
    assert select_modules(model, 'WindowMSA') == [model.swin.w_msa]
    assert select_modules(model, 'decoder') == [model.decoder]
    # lists are never called: their members stand for them
    assert select_modules(model, 'encoder') == list(model.encoder)
    assert select_modules(model, 'neck') == [model.neck]
    assert select_modules(model, 'ModuleDict') == [model.neck[1]['a']]
    for choice in ('FPN', ''):
        with pytest.raises(ValueError, match='none of such a class') as error:
            select_modules(model, choice)
        assert repr(choice) in str(error.value)
        assert "'swin', 'encoder', 'decoder'" in str(error.value)
        assert "'WindowMSA'" in str(error.value)


def test_imports_torch_alone():
    code = (
        'import sys\n'
        'import deform_gqa.profiling.module_timing\n'
        "found = {'mmengine', 'mmcv', 'mmdet'} & set(sys.modules)\n"
        'sys.exit(str(found) if found else 0)\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


class FakeCuda:
    """Events of a device that nobody has waited for until ``synchronize``."""

    def __init__(self):
        self.synchronized = 0

    def synchronize(self, device):
        self.synchronized += 1

    def current_stream(self, device):
        return 'stream'

    def event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self, stream):
        assert stream == 'stream'
        self.at_s = CLOCK.now_s

    def elapsed_time(self, end):
        assert self.cuda.synchronized
        return (end.at_s - self.at_s) * 1e3


def test_events_are_read_after_one_synchronization(monkeypatch):
    cuda = FakeCuda()
    for name in ('synchronize', 'current_stream'):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, 'Event', cuda.event)
    attention = NapAttention(NAP_MS, NAP_MS)
    timer = ModuleTimer({'a': [attention]}, torch.device('cuda'))
    with timer:
        attention(attention(batch(True))).sum().backward()
    assert cuda.synchronized == 0
    time = timer.result()['a']
    assert cuda.synchronized == 1
    assert time.forward_ms == naps(2)
    assert time.backward_ms == naps(2)


@pytest.mark.cuda
def test_cuda_events():
    device = torch.device('cuda')
    model = nn.Sequential(nn.Linear(2048, 2048), NapAttention(), nn.Linear(4, 4))
    model[1].linear = nn.Linear(2048, 4)
    model.to(device)
    x = torch.randn(4096, 2048, device=device)
    timer = ModuleTimer({'a': [model[1]], 'all': [model]}, device)
    for _ in range(2):
        with timer:
            model(x).sum().backward()
        times = timer.result()
    assert 0 < times['a'].forward_ms < times['all'].forward_ms
    assert 0 < times['a'].backward_ms < times['all'].backward_ms
