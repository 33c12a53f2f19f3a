"""GroupedWindowMSA beside mmdet's WindowMSA."""

import pytest
import torch
from mmdet.models.backbones.swin import WindowMSA
from torch import nn

from deform_gqa.models.layers import GroupedWindowMSA

HEADS, DIM, WINDOW = 4, 16, (2, 3)


def pair(**options):
    torch.manual_seed(0)
    original = WindowMSA(DIM, HEADS, WINDOW, **options).eval()
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = GroupedWindowMSA.from_module(original)
    ours.load_state_dict(original.state_dict())
    return original, ours


@pytest.mark.parametrize('training', [False, True])
def test_the_mode_is_that_of_the_original(training):
    original = pair()[0].train(training)
    assert GroupedWindowMSA.from_module(original).training == training


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(8, 6, DIM)


@pytest.fixture
def mask():
    return torch.where(torch.rand(4, 6, 6) < 0.5, -100.0, 0.0)


@pytest.mark.parametrize('options', [dict(), dict(qkv_bias=False), dict(qk_scale=0.3)])
def test_outputs_are_those_of_mmdet(options, x, mask):
    original, ours = pair(**options)
    for call in (dict(), dict(mask=mask)):
        torch.testing.assert_close(ours(x, **call), original(x, **call))


def test_gradients_are_those_of_mmdet(x, mask):
    original, ours = pair()
    for module in (original, ours):
        module.double()(x.double(), mask.double()).square().sum().backward()
    wanted = dict(original.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, msg=name)


def test_buffers_and_initialisation_are_those_of_mmdet():
    modules = []
    for cls in (WindowMSA, GroupedWindowMSA):
        torch.manual_seed(0)
        modules.append(cls(DIM, HEADS, WINDOW))
        modules[-1].init_weights()
    ours = modules[1].state_dict()
    assert list(ours) == list(modules[0].state_dict())
    for name, value in modules[0].state_dict().items():
        assert torch.equal(ours[name], value), name


def test_grouped_heads_are_repeated_heads(x, mask):
    original, _ = pair()
    ours = GroupedWindowMSA.from_module(original, 2)
    state, small = original.state_dict(), dict(original.state_dict())
    for name in ('qkv.weight', 'qkv.bias'):
        rows = state[name].unflatten(0, (3, HEADS, -1))
        small[name] = torch.cat([rows[0].flatten(0, 1), rows[1:, ::2].flatten(0, 2)])
        rows[1:, 1::2] = rows[1:, ::2].clone()
    ours.load_state_dict(small)
    torch.testing.assert_close(ours(x, mask), original(x, mask))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_kv_heads=3), 'num_kv_heads=3'),
        (dict(attn_drop_rate=2.0), r'attn_drop_rate must be in \[0, 1\), got 2.0'),
        (dict(proj_drop_rate=-1.0), r'proj_drop_rate must be in \[0, 1\), got -1.0'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        GroupedWindowMSA(DIM, HEADS, WINDOW, **options)


def test_scale_must_be_a_number():
    with pytest.raises(TypeError, match='qk_scale must be a number'):
        GroupedWindowMSA(DIM, HEADS, WINDOW, qk_scale='1')
