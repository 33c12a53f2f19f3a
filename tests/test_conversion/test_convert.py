"""Conversion of modules and of their state_dicts."""

import pytest
import torch
from torch import nn

from deform_gqa.conversion import (
    convert_model,
    convert_state_dict,
    find_adapter,
)
from deform_gqa.models.layers import (
    DeformableGQA,
    MultiheadGQA,
    NeighborhoodAttention,
    PyramidAttention,
    ShiftedWindowAttention,
    WindowAttention,
)

HEADS = 8


def deformable(**options):
    options = dict(stride=2, table_size=(9, 11), offset_groups=2) | options
    return DeformableGQA(32, HEADS, **options)


class SelfAttention(nn.Module):
    """A module for sequences, called with one input."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        x = x.flatten(2).mT
        return self.attention(x, x, x)[0]


MODULES = {
    'window': lambda: WindowAttention(32, HEADS, window_size=3),
    'shifted window': lambda: ShiftedWindowAttention(32, HEADS, window_size=4),
    'neighborhood': lambda: NeighborhoodAttention(32, HEADS, kernel_size=3),
    'pyramid': lambda: PyramidAttention(32, HEADS, sr_ratio=2),
    'deformable': deformable,
    'one offset group': lambda: deformable(offset_groups=1),
    'log_cpb': lambda: deformable(position_bias='log_cpb'),
    'fixed': lambda: deformable(position_bias='fixed'),
    'dwc': lambda: deformable(position_bias='dwc'),
    'pooled': lambda: deformable(use_offset=False),
    'MultiheadGQA': lambda: SelfAttention(MultiheadGQA(32, HEADS, HEADS)),
}


def make(name):
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.fixture(params=MODULES)
def module(request):
    return make(request.param)


@pytest.fixture
def x():
    return torch.randn(2, 32, 9, 11, generator=torch.Generator().manual_seed(1))


def relative_error(out, expected):
    return float(((out - expected).norm() / expected.norm()).detach())


def attention_of(module):
    return getattr(module, 'attention', module)


def test_as_many_kv_heads_change_nothing(module, x):
    converted, report = convert_model(module, HEADS)
    assert report.converted == []
    assert torch.equal(converted(x), module(x))


def test_kv_projections_shrink_with_the_heads(module):
    _, report = convert_model(module, '1/4')
    [layer] = report.layers
    assert layer.kv_heads == (HEADS, 2)
    assert layer.kv_params[0] == 4 * layer.kv_params[1]
    assert layer.kv_bytes == (2 * 32 * 4, 2 * 8 * 4)
    assert layer.params[0] - layer.params[1] == layer.kv_params[0] * 3 // 4


@pytest.mark.parametrize('merge', ['mean', 'first', 'norm', 'aligned', 'rotated'])
def test_equal_heads_merge_without_error(module, x, merge):
    """Also heads that are no neighbours: query heads and position bias move along."""
    attention = attention_of(module)
    period = find_adapter(attention).head_period(attention)
    groups = [[0, 2], [1, 3], [4, 6], [5, 7]] if period > 2 else [[0, 1], [2, 3]]
    groups = groups if period > 2 else [*groups, [4, 5], [6, 7]]
    copies = dict(pair for pair in groups)
    with torch.no_grad():
        for projection in kv_rows(attention):
            for source, copy in copies.items():
                projection[copy] = projection[source]
        expected = module(x)
    converted, _ = convert_model(module, 4, grouping=groups, merge=merge)
    assert relative_error(converted(x), expected) < 1e-5


def kv_rows(attention):
    """Views (heads, head_dim, ...) of the weights and biases of keys and values."""
    names = find_adapter(attention).names(attention)
    for role in 'kv':
        for kind in (0, 1):
            name = getattr(names, role)[kind]
            rows = attention.get_parameter(name).detach().unflatten(0, (-1, 4))
            shared = [r for r in 'qkv' if getattr(names, r)[kind] == name]
            yield rows.split(HEADS)[shared.index(role)]


def test_the_model_is_left_alone():
    module = make('window')
    before = {name: x.clone() for name, x in module.state_dict().items()}
    convert_model(module, 2, merge='aligned')
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    assert module.num_kv_heads == HEADS


def test_state_dict_and_model_give_the_same_weights():
    module = make('deformable')
    converted, _ = convert_model(module, 2, merge='random', seed=3)
    template = deformable(num_kv_heads=2)
    state, _ = convert_state_dict(
        module.state_dict(), template, None, merge='random', seed=3
    )
    assert list(state) == list(template.state_dict())
    template.load_state_dict(state)
    for name, value in converted.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_kv_heads_that_serve_several_offset_groups_stay_in_their_order():
    module = deformable(num_kv_heads=2, offset_groups=HEADS)
    _, report = convert_model(module, 1, 'similarity')
    assert report.layers[0].groups == [[0, 1]]
