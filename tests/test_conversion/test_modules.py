"""Adapters, and models whose modules need care."""

import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import nn

from deform_gqa.conversion import (
    AttentionAdapter,
    Freedom,
    Names,
    SeparateGrouping,
    adapter,
    convert_checkpoint,
    convert_heads,
    convert_model,
    convert_state_dict,
    register_adapter,
)
from deform_gqa.models.layers import (
    GroupedMultiheadAttention,
    NeighborhoodAttention,
    WindowAttention,
)

HEADS, DIM = 4, 16


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(DIM, HEADS, batch_first=True, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 5, DIM)


def copy_heads(module, keys, values):
    """Makes heads of a module equal: second as first, of each pair."""
    for name in ('in_proj_weight', 'in_proj_bias'):
        rows = getattr(module, name).detach().unflatten(0, (3, HEADS, -1))
        for side, pairs in ((1, keys), (2, values)):
            for first, second in pairs:
                rows[side, second] = rows[side, first]


@torch.no_grad()
@pytest.mark.parametrize('merge', ['mean', 'aligned'])
@pytest.mark.parametrize('calibrated', [False, True])
def test_keys_and_values_in_groups_of_their_own(x, merge, calibrated):
    module = attention()
    copy_heads(module, [(0, 1), (2, 3)], [(0, 3), (1, 2)])
    wanted = module(x, x, x)[0]
    converted, report = convert_model(
        module,
        2,
        SeparateGrouping(keys='similarity', values=[[0, 3], [1, 2]]),
        merge,
        calibration=(lambda model: model(x, x, x)) if calibrated else None,
    )
    [layer] = report.layers
    assert (layer.groups, layer.value_groups) == ([[0, 1], [2, 3]], [[0, 3], [1, 2]])
    assert converted.value_heads == layer.value_heads == (0, 1, 1, 0)
    torch.testing.assert_close(converted(x, x, x)[0], wanted)
    if calibrated:
        assert layer.error < 1e-5


@torch.no_grad()
def test_weights_for_a_module_with_value_heads(x):
    """The module of the config says which values its query heads read."""
    module = attention()
    copy_heads(module, [(0, 2), (1, 3)], [(0, 3), (1, 2)])
    grouping = dict(keys=[[0, 2], [1, 3]], values=[[0, 3], [1, 2]])
    new = GroupedMultiheadAttention(
        DIM, HEADS, 2, batch_first=True, value_heads=(0, 1, 1, 0)
    )
    state, _ = convert_state_dict(module.state_dict(), new, None, grouping)
    new.load_state_dict(state)
    torch.testing.assert_close(new(x, x, x)[0], module(x, x, x)[0])
    with pytest.raises(ValueError, match=r'value_heads of the module must be None'):
        convert_state_dict(module.state_dict(), new, None)


def test_modules_that_read_keys_and_values_alike():
    module = WindowAttention(DIM, HEADS, window_size=2)
    with pytest.raises(ValueError, match='WindowAttention cannot group keys and'):
        convert_model(module, 2, dict(keys='similarity', values='adjacent'))


@pytest.mark.parametrize('value_heads', [(0, 0, 1), (0, 1, 2, 0)])
def test_wrong_value_heads(value_heads):
    with pytest.raises(ValueError, match='value_heads must be 4 numbers from 0 to 1'):
        GroupedMultiheadAttention(DIM, HEADS, 2, value_heads=value_heads)


@torch.no_grad()
def test_torchs_transformer_keeps_its_masks(x):
    """Its encoder packs padded sequences, for which torch alone has a kernel."""
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    for module in encoder.layers:
        copy_heads(module.self_attn, [(0, 1), (2, 3)], [(0, 1), (2, 3)])
    padding = torch.tensor([[False] * n + [True] * (5 - n) for n in (5, 3, 2)])
    converted, report = convert_model(encoder, 2)
    assert len(report.converted) == 2
    out = converted(x, src_key_padding_mask=padding)
    wanted = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[~padding], wanted[~padding], rtol=1e-4, atol=1e-5)


def test_a_module_in_two_places_stays_one():
    model = nn.ModuleDict()
    model['first'] = attention()
    model['second'] = model['first']
    converted, report = convert_model(model, 2, merge='random')
    assert [layer.name for layer in report.layers] == ['first', 'second']
    assert converted['first'] is converted['second']
    assert model['first'] is not converted['first']


def test_in_place():
    model = nn.ModuleList([attention()])
    same, _ = convert_model(model, 1, inplace=True)
    assert same is model
    assert isinstance(model[0], GroupedMultiheadAttention)


def test_patterns_leave_other_modules_alone():
    model = nn.ModuleDict(dict(a=attention(), b=attention(), c=attention()))
    converted, report = convert_model(
        model, {'a|b': 2}, grouping={'a': [[0, 3], [1, 2]], 'b': 'similarity'}
    )
    assert [layer.name for layer in report.layers] == ['a', 'b']
    assert report.layers[0].groups == [[0, 3], [1, 2]]
    assert type(converted['c']) is nn.MultiheadAttention


def test_random_heads_of_two_layers_differ():
    model = nn.ModuleList([attention(), attention()])
    with torch.no_grad():
        model[1].in_proj_weight.neg_()
    converted, _ = convert_model(model, 2, merge='random')
    first, second = (layer.in_proj_weight[DIM:] for layer in converted)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ('query', 'groups'),
    [('any', [[0, 1], [2, 3]]), ('none', [[0, 2], [1, 3]])],
)
def test_rotated_keys_are_alike_where_queries_may_turn(query, groups, monkeypatch):
    module = attention()
    copy_heads(module, [], [(0, 1), (0, 2), (0, 3)])
    rows = module.in_proj_weight.detach().unflatten(0, (3, HEADS, -1))[1]
    rows[2] += rows[0]
    rows[1], rows[3] = rows[0].flip(0), rows[2].flip(0)
    module.in_proj_bias.detach()[DIM : 2 * DIM] = 0
    find = adapter.find_adapter(module)
    monkeypatch.setattr(find, 'freedom', lambda module: Freedom(query), raising=False)
    _, report = convert_model(module, 2, 'similarity', 'aligned')
    assert report.layers[0].groups == groups


def test_frozen_parameters_stay_frozen():
    module = attention()
    module.in_proj_weight.requires_grad_(False)
    converted, _ = convert_model(module, 2)
    for name, parameter in converted.named_parameters():
        assert parameter.requires_grad == (name != 'in_proj_weight')


class Doubled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


def test_a_forward_of_its_own_is_not_lost():
    with pytest.raises(ValueError, match='Doubled has a forward of its own'):
        convert_model(Doubled(DIM, HEADS), 2)


def test_patterns_that_are_no_regular_expressions():
    with pytest.raises(ValueError, match=r"grouping: '\(' is no regular expression"):
        convert_model(attention(), 2, {'(': 'adjacent'})
    state = attention().state_dict()
    with pytest.raises(ValueError, match=r"ignore: '\(' is no regular expression"):
        convert_checkpoint(state, attention(), 2, ignore=['('])


def test_ignored_keys_are_found_anywhere_in_names():
    model = nn.ModuleDict(dict(attn=attention(), head=nn.Linear(DIM, 2)))
    state, _ = convert_checkpoint(model.state_dict(), model, 2, ignore=['ad.weight'])
    assert set(model.state_dict()) - set(state) == {'head.weight'}


def test_weights_that_are_not_finite():
    state = attention().state_dict()
    state['in_proj_bias'][3] = float('nan')
    with pytest.raises(ValueError, match='in_proj_bias holds numbers that are not'):
        convert_state_dict(state, attention(), 2)


@pytest.mark.parametrize('merge', ['mean', 'aligned'])
def test_calibration_data_that_is_not_finite(x, merge):
    x[0, 0, 0] = float('inf')
    with pytest.raises(ValueError, match='outputs of the module are not finite'):
        convert_model(
            attention(), 2, merge=merge, calibration=[dict(query=x, key=x, value=x)]
        )


@pytest.mark.cuda
def test_tables_are_reordered_on_their_device():
    module = WindowAttention(DIM, HEADS, window_size=2).cuda()
    converted, _ = convert_model(module, 2, [[0, 2], [1, 3]])
    table = converted.relative_position_bias_table
    assert torch.equal(table, module.relative_position_bias_table[:, [0, 2, 1, 3]])


def test_gradients_reach_the_converted_parameters(x):
    converted, _ = convert_model(attention(), 1)
    converted(x, x, x)[0].square().sum().backward()
    for name, parameter in converted.named_parameters():
        if name != 'in_proj_bias':  # the bias of the keys has none
            assert parameter.grad.abs().max() > 0, name


class Plain(nn.Module):
    """An attention module that conversion does not know."""

    def __init__(self, dim, num_heads, num_kv_heads):
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        kv_dim = dim // num_heads * num_kv_heads
        self.q, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(dim, kv_dim, bias=False) for _ in range(2))


class PlainChild(Plain):
    pass


@pytest.mark.parametrize('cls', [Plain, PlainChild])
def test_adapters_of_projects(cls, monkeypatch):
    with pytest.raises(ValueError, match='has no attention module that conversion'):
        convert_model(cls(DIM, HEADS, HEADS), 2)
    monkeypatch.setattr(adapter, '_ADAPTERS', dict(adapter._ADAPTERS))

    @register_adapter(f'{Plain.__module__}.Plain')
    class PlainAdapter(AttentionAdapter):
        def names(self, module):
            return Names(*((f'{part}.weight', None) for part in 'qkvo'))

    converted, report = convert_model(cls(DIM, HEADS, HEADS), 2)
    assert converted.k.weight.shape == (8, DIM)
    assert (converted.num_kv_heads, converted.k.out_features) == (2, 8)
    assert report.layers[0].type == cls.__name__


@pytest.mark.parametrize('option', ['add_bias_kv', 'add_zero_attn'])
def test_modules_that_cannot_be_converted(option):
    with pytest.raises(ValueError, match=f'{option}=True'):
        convert_model(attention(**{option: True}), 2)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(merge='median'), ValueError, "merge must be one of .* got 'median'"),
        (dict(grouping='best'), ValueError, "grouping must be one of .* got 'best'"),
        (dict(grouping=3), TypeError, 'grouping must be a name, .* got 3'),
        (dict(grouping={'x': 'adjacent'}), ValueError, "pattern 'x' fits none"),
        (dict(grouping=[[0, 1, 2, 3]]), ValueError, 'must be 2 lists of equal length'),
        (dict(grouping='activations'), ValueError, 'activations.* needs calibration'),
        (dict(merge='learned'), ValueError, "merge='learned' needs calibration data"),
        (dict(refit_output=True), ValueError, 'refit_output=True needs calibration'),
        (dict(refit_output=1), TypeError, 'refit_output must be a bool'),
        (dict(seed=0.5), TypeError, 'seed must be an integer'),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        convert_model(attention(), 2, **options)


def test_heads_are_not_multiplied():
    module = GroupedMultiheadAttention(DIM, HEADS, 2)
    with pytest.raises(ValueError, match='has 2 kv heads in the state_dict, which'):
        convert_state_dict(module.state_dict(), attention(), 4)


@pytest.mark.parametrize(
    ('name', 'shape', 'message'),
    [
        ('in_proj_weight', None, 'has no in_proj_weight'),
        ('in_proj_bias', None, 'has no in_proj_bias'),
        ('in_proj_weight', (40, 16), r'in_proj_weight has shape \(40, 16\)'),
        ('in_proj_bias', (40,), r'in_proj_bias has shape \(40,\), expected 12 heads'),
        ('out_proj.weight', (16, 15), r'out_proj.weight has shape \(16, 15\), which'),
    ],
)
def test_weights_that_do_not_fit(name, shape, message):
    state = attention().state_dict()
    state.pop(name)
    if shape is not None:
        state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state, attention(), 2)


class Detector(BaseModule):
    """A model whose attention is named in code, with its own way to load weights."""

    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.attn = nn.MultiheadAttention(DIM, HEADS, dropout=0.25)
        self.block = NeighborhoodAttention(DIM, HEADS, kernel_size=3)


@pytest.fixture
def registered():
    MODELS.register_module(module=Detector, force=True)
    yield
    MODELS.module_dict.pop('Detector')


def test_config_of_a_model_that_converts_what_it_loads(registered, tmp_path):
    trained = Detector()
    path = tmp_path / 'trained.pth'
    torch.save(trained.state_dict(), path)
    model = dict(
        type='Detector', init_cfg=dict(type='Pretrained', checkpoint=str(path))
    )
    model = MODELS.build(
        dict(type='convert_heads', model=model, num_kv_heads='1/2', merge='first')
    )
    assert isinstance(model.attn, GroupedMultiheadAttention)
    assert model.attn.dropout == 0.25
    model.init_weights()
    expected, _ = convert_state_dict(trained.state_dict(), model, merge='first')
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    model.load_state_dict(expected)  # which has the wanted heads already
    assert torch.equal(model.attn.in_proj_weight, expected['attn.in_proj_weight'])


def test_copies_of_such_a_model_convert_as_well():
    model = copy.deepcopy(convert_heads(Detector(), 2))
    trained = Detector()
    model.load_state_dict(trained.state_dict())
    expected, _ = convert_state_dict(trained.state_dict(), model)
    assert torch.equal(model.block.qkv.weight, expected['block.qkv.weight'])


def test_checkpoints_of_wrapped_models():
    trained = Detector()
    wrapped = {f'module.{name}': x for name, x in trained.state_dict().items()}
    state, report = convert_checkpoint(dict(state_dict=wrapped), trained, 2)
    expected, _ = convert_state_dict(trained.state_dict(), trained, 2)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert len(report.converted) == 2
