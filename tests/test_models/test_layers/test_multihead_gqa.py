"""MultiheadGQA against the original and against nn.MultiheadAttention."""

import pytest
import torch
from golden import assert_close, load_golden, sub_dict
from mmdet.registry import MODELS
from torch import nn

from deform_gqa.models.layers import MultiheadGQA

BATCH, LENGTH, KEYS, CHANNELS, HEADS = 2, 7, 9, 24, 4


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(
            BATCH, length, CHANNELS, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for length in (LENGTH, KEYS, KEYS)
    ]


def make_attn_mask(kind):
    """None, or a mask of nn.MultiheadAttention; each query keeps its first key."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(1)
    shape = (LENGTH, KEYS)
    if kind.startswith('3d'):
        shape = (BATCH * HEADS, *shape)
    hidden = torch.rand(shape, generator=generator) > 0.6
    hidden[..., 0] = False
    if kind.endswith('bool'):
        return hidden
    mask = torch.randn(shape, generator=generator, dtype=torch.float64)
    return mask.masked_fill(hidden, -torch.inf)


def make_padding_mask(kind):
    if kind is None:
        return None
    hidden = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    hidden[0, -2:] = True
    hidden[1, -4:] = True
    if kind == 'bool':
        return hidden
    return torch.linspace(-1, 1, BATCH * KEYS).view(BATCH, KEYS).double()


@pytest.fixture
def pair():
    """Ours and torch's module with the same weights."""
    torch.manual_seed(0)
    ours = MultiheadGQA(CHANNELS, HEADS, HEADS, layer_norm=False).double()
    theirs = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True).double()
    with torch.no_grad():
        projections = (ours.q_proj, ours.k_proj, ours.v_proj)
        for proj in projections:
            proj.bias.normal_()
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    return ours, theirs


def test_equals_the_original():
    config, arrays = load_golden('multihead_gqa')
    is_causal = config.pop('is_causal')
    module = MODELS.build(dict(type='MultiheadGQA', **config))
    module.load_state_dict(sub_dict(arrays, 'state/'))
    query = arrays['query'].clone().requires_grad_()
    key_value = arrays['key_value'].clone().requires_grad_()
    out, weights = module(query, key_value, key_value, is_causal=is_causal)
    assert weights is None
    assert_close('out', out, arrays['out'])
    (out * arrays['gout']).sum().backward()
    assert_close('grad_query', query.grad, arrays['grad_query'])
    assert_close('grad_key_value', key_value.grad, arrays['grad_key_value'])
    expected = sub_dict(arrays, 'grad/')
    # Softmax does not feel a shift of all keys: the gradient of the key bias is
    # rounding noise around zero.
    floor = 1e-2 * max(grad.abs().max().item() for grad in expected.values())
    assert expected.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        assert_close(name, parameter.grad, expected[name], floor)


@pytest.mark.parametrize('need_weights', [True, False])
@pytest.mark.parametrize('padding', [None, 'bool', 'float'])
@pytest.mark.parametrize('attn', [None, '2d bool', '2d float', '3d bool', '3d float'])
@pytest.mark.filterwarnings('ignore:Support for mismatched')
def test_equals_torch(pair, attn, padding, need_weights):
    inputs = make_inputs()
    masks = dict(
        attn_mask=make_attn_mask(attn), key_padding_mask=make_padding_mask(padding)
    )
    results = []
    for module in pair:
        out, weights = module(
            *inputs, need_weights=need_weights, average_attn_weights=False, **masks
        )
        loss = out.sin().sum()
        if need_weights and module is pair[0]:
            assert weights.shape == (BATCH, LENGTH, KEYS, HEADS)
            weights = weights.permute(0, 3, 1, 2)
        if need_weights:
            loss = loss + weights.square().sum()
        grads = torch.autograd.grad(loss, inputs)
        results.append((out, weights, *grads, module.out_proj.weight))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('padding', [None, 'bool', 'float'])
@pytest.mark.parametrize('attn', [None, '2d bool', '3d float'])
def test_causal_adds_to_the_masks(pair, attn, padding):
    ours, _ = pair
    inputs = make_inputs()
    causal = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
    attn_mask = make_attn_mask(attn)
    padding_mask = make_padding_mask(padding)
    if attn_mask is None:
        combined = causal
    elif attn_mask.dtype == torch.bool:
        combined = attn_mask | causal
    else:
        combined = attn_mask.masked_fill(causal, -torch.inf)
    expected, _ = ours(*inputs, attn_mask=combined, key_padding_mask=padding_mask)
    for need_weights in (True, False):
        out, _ = ours(
            *inputs,
            need_weights=need_weights,
            attn_mask=attn_mask,
            key_padding_mask=padding_mask,
            is_causal=True,
        )
        torch.testing.assert_close(out, expected)


def test_averaged_weights(pair):
    inputs = make_inputs()
    _, ours = pair[0](*inputs, need_weights=True, average_attn_weights=True)
    _, theirs = pair[1](*inputs, need_weights=True, average_attn_weights=True)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('need_weights', [True, False])
@pytest.mark.parametrize('kind', ['bool', 'float'])
def test_query_without_keys_gets_the_output_bias(kind, need_weights):
    module = MultiheadGQA(CHANNELS, HEADS, 2, layer_norm=False).double()
    nn.init.normal_(module.out_proj.bias)
    hidden = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    hidden[0] = True
    mask = hidden
    if kind == 'float':
        mask = torch.zeros(BATCH, KEYS).masked_fill(hidden, -torch.inf).double()
    inputs = make_inputs()
    out, _ = module(*inputs, key_padding_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[0], module.out_proj.bias.expand(LENGTH, -1))
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert grad.isfinite().all()


@pytest.mark.parametrize('need_weights', [True, False])
def test_dropout_in_training_only(need_weights):
    module = MultiheadGQA(CHANNELS, HEADS, 2, dropout=0.5).double()
    inputs = make_inputs()
    outs = [module(*inputs, need_weights=need_weights)[0] for _ in range(2)]
    assert not torch.allclose(*outs)
    module.eval()
    outs = [module(*inputs, need_weights=need_weights)[0] for _ in range(2)]
    torch.testing.assert_close(*outs)


def test_layers_and_initialisation():
    torch.manual_seed(0)
    module = MultiheadGQA(36, 6, 2, bias=False, layer_norm=False, gamma_init=0.1)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        'q_proj.weight': (36, 36),
        'k_proj.weight': (12, 36),
        'v_proj.weight': (12, 36),
        'out_proj.weight': (36, 36),
    }
    ratio = module.out_proj.weight.std() / module.q_proj.weight.std()
    assert 0.09 < ratio < 0.11
    module = MultiheadGQA(36, 6, 2, layer_norm_eps=0.5, dtype=torch.float64)
    assert module.norm.eps == 0.5
    assert all(p.dtype == torch.float64 for p in module.parameters())
    assert not module.q_proj.bias.any()


def test_half_precision():
    module = MultiheadGQA(CHANNELS, HEADS, 2)
    inputs = [x.detach().float() for x in make_inputs()]
    expected, _ = module(*inputs)
    mask = make_attn_mask('3d float').float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out, _ = module(*inputs)
        module(*inputs, attn_mask=mask, need_weights=True)
        module(*inputs, attn_mask=mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(embed_dim=25), 'embed_dim must be a multiple of query_heads'),
        (dict(query_heads=0), 'embed_dim must be a multiple of query_heads'),
        (dict(kv_heads=3), 'query_heads must be a multiple of kv_heads'),
        (dict(kv_heads=0), 'query_heads must be a multiple of kv_heads'),
        (dict(dropout=1.0), 'dropout must be in'),
        (dict(dropout=-0.1), 'dropout must be in'),
    ],
)
def test_constructor_errors(changes, message):
    options = dict(embed_dim=CHANNELS, query_heads=HEADS, kv_heads=2)
    with pytest.raises(ValueError, match=message):
        MultiheadGQA(**(options | changes))


def test_dropout_is_a_number():
    with pytest.raises(TypeError, match='dropout must be a number, got False'):
        MultiheadGQA(CHANNELS, HEADS, 2, dropout=False)


@pytest.mark.parametrize('value', [True, 4.0, '4'])
@pytest.mark.parametrize('name', ['embed_dim', 'query_heads', 'kv_heads'])
def test_counts_are_integers(name, value):
    options = dict(embed_dim=CHANNELS, query_heads=HEADS, kv_heads=2)
    with pytest.raises(TypeError, match=f'{name} must be an integer, got {value!r}'):
        MultiheadGQA(**(options | {name: value}))


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        (dict(query=torch.zeros(7, 24)), ValueError, 'query must have shape'),
        (dict(query=torch.zeros(2, 7, 20)), ValueError, 'query must have shape'),
        (dict(key=torch.zeros(2, 8, 24)), ValueError, 'value must have shape'),
        (dict(key=torch.zeros(3, 9, 24)), ValueError, 'key must have shape'),
        (dict(value=torch.zeros(2, 9, 20)), ValueError, 'value must have shape'),
        (dict(attn_mask=torch.zeros(7, 8)), ValueError, 'attn_mask must have shape'),
        (dict(attn_mask=torch.zeros(9)), ValueError, 'attn_mask must have shape'),
        (dict(attn_mask=torch.zeros(2, 7, 9)), ValueError, 'attn_mask must have'),
        (dict(attn_mask=torch.zeros(7, 9).int()), TypeError, 'attn_mask must be'),
        (dict(key_padding_mask=torch.zeros(2, 7)), ValueError, 'key_padding_mask'),
        (dict(key_padding_mask=torch.zeros(2, 9).int()), TypeError, 'key_padding_ma'),
    ],
)
def test_forward_errors(changes, error, message):
    module = MultiheadGQA(CHANNELS, HEADS, 2)
    names = ('query', 'key', 'value')
    tensors = (x.detach().float() for x in make_inputs())
    inputs = dict(zip(names, tensors, strict=True))
    with pytest.raises(error, match=message):
        module(**(inputs | changes))
