"""GroupedMultiheadAttention beside torch's module."""

import pytest
import torch
from torch import nn

from deform_gqa.models.layers import GroupedMultiheadAttention

HEADS, DIM, BATCH, LENGTH, KEYS = 4, 16, 2, 5, 7


def pair(**options):
    """torch's module and ours with its weights, biases included."""
    torch.manual_seed(0)
    original = nn.MultiheadAttention(DIM, HEADS, **options).eval()
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = GroupedMultiheadAttention.from_module(original)
    ours.load_state_dict(original.state_dict())
    return original, ours


def inputs(batch_first=False, kdim=DIM, vdim=DIM):
    torch.manual_seed(1)
    shapes = [(BATCH, LENGTH, DIM), (BATCH, KEYS, kdim), (BATCH, KEYS, vdim)]
    tensors = [torch.randn(shape) for shape in shapes]
    return tensors if batch_first else [x.transpose(0, 1) for x in tensors]


MASK = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * KEYS, [False] * 3 + [True] * (KEYS - 3)])
FLOAT_MASK = torch.randn(LENGTH, KEYS, generator=torch.Generator().manual_seed(2))
CALLS = [
    dict(),
    dict(need_weights=False),
    dict(average_attn_weights=False),
    dict(attn_mask=MASK),
    dict(attn_mask=MASK, is_causal=True, need_weights=False),
    dict(attn_mask=FLOAT_MASK),
    dict(attn_mask=FLOAT_MASK.expand(BATCH * HEADS, -1, -1), need_weights=False),
    dict(key_padding_mask=PADDING),
    dict(attn_mask=MASK, key_padding_mask=PADDING, average_attn_weights=False),
]


@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('call', CALLS, ids=lambda call: ' '.join(call))
def test_calls_are_those_of_torch(call, batch_first):
    original, ours = pair(batch_first=batch_first)
    x = inputs(batch_first)
    for have, want in zip(ours(*x, **call), original(*x, **call), strict=True):
        if want is None:
            assert have is None
        else:
            torch.testing.assert_close(have, want)


@pytest.mark.parametrize('options', [dict(bias=False), dict(kdim=8, vdim=12)])
def test_options_are_those_of_torch(options):
    original, ours = pair(**options)
    widths = {name: n for name, n in options.items() if name != 'bias'}
    x = inputs(**widths)
    torch.testing.assert_close(ours(*x)[0], original(*x)[0])


def test_inputs_without_a_batch():
    original, ours = pair()
    x = [tensor[:, 0] for tensor in inputs()]
    call = dict(key_padding_mask=PADDING[1], attn_mask=MASK)
    for have, want in zip(ours(*x, **call), original(*x, **call), strict=True):
        torch.testing.assert_close(have, want)


def test_gradients_are_those_of_torch():
    original, ours = pair()
    for module in (original, ours):
        module(*inputs(), attn_mask=FLOAT_MASK)[0].square().sum().backward()
    wanted = dict(original.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, msg=name)


def test_initialisation_is_that_of_torch():
    torch.manual_seed(0)
    original = nn.MultiheadAttention(DIM, HEADS)
    torch.manual_seed(0)
    ours = GroupedMultiheadAttention(DIM, HEADS).state_dict()
    for name, value in original.state_dict().items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize('options', [dict(), dict(kdim=8, vdim=12)])
def test_grouped_heads_are_repeated_heads(options):
    """With 2 kv heads of 4, heads 0 and 1 read the first, 2 and 3 the second."""
    original, _ = pair(**options)
    ours = GroupedMultiheadAttention.from_module(original, 2)
    state = original.state_dict()
    bias = state['in_proj_bias'].unflatten(0, (3, HEADS, -1))
    small = dict(
        state, in_proj_bias=torch.cat([bias[0].ravel(), bias[1:, ::2].ravel()])
    )
    bias[1:, 1::2] = bias[1:, ::2]
    if options:
        for name in ('k_proj_weight', 'v_proj_weight'):
            rows = state[name].unflatten(0, (HEADS, -1))
            small[name] = rows[::2].flatten(0, 1)
            rows[1::2] = rows[::2].clone()
    else:
        rows = state['in_proj_weight'].unflatten(0, (3, HEADS, -1))
        small['in_proj_weight'] = torch.cat(
            [rows[0].flatten(0, 1), rows[1:, ::2].flatten(0, 2)]
        )
        rows[1:, 1::2] = rows[1:, ::2].clone()
    ours.load_state_dict(small)
    x = inputs(**options)
    torch.testing.assert_close(ours(*x), original(*x))


def test_dropout_in_training_alone():
    ours = GroupedMultiheadAttention(DIM, HEADS, 2, dropout=0.5)
    x = inputs()
    outs = [ours(*x, need_weights=False)[0] for _ in range(2)]
    assert not torch.equal(*outs)
    ours.eval()
    outs = [ours(*x, need_weights=False)[0] for _ in range(2)]
    assert torch.equal(*outs)


def test_a_query_without_keys_gets_zeros():
    ours = GroupedMultiheadAttention(DIM, HEADS, 2)
    out, weights = ours(*inputs(), attn_mask=torch.ones(LENGTH, KEYS).bool())
    assert torch.equal(out, ours.out_proj.bias.expand_as(out))
    assert weights.count_nonzero() == 0


def test_no_keys_at_all():
    ours = GroupedMultiheadAttention(DIM, HEADS, 2)
    query, key, value = inputs()
    mask = torch.ones(LENGTH, 0).bool()
    out, weights = ours(query, key[:0], value[:0], attn_mask=mask)
    assert torch.equal(out, ours.out_proj.bias.expand_as(out))
    assert weights.shape == (query.shape[1], LENGTH, 0)


def test_torchs_encoder_layer_calls_it():
    """In eval mode torch's layers would bypass modules that look like its own."""
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 8, batch_first=True).eval()
    x = inputs(batch_first=True)[0]
    with torch.no_grad():
        expected = layer(x)
        original = layer.self_attn
        layer.self_attn = GroupedMultiheadAttention.from_module(original)
        layer.self_attn.load_state_dict(original.state_dict())
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('option', ['add_bias_kv', 'add_zero_attn'])
def test_learnt_or_zero_keys_have_no_counterpart(option):
    with pytest.raises(ValueError, match=f'{option}=True'):
        GroupedMultiheadAttention.from_module(
            nn.MultiheadAttention(DIM, HEADS, **{option: True})
        )


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(num_kv_heads=3), ValueError, 'num_kv_heads=3'),
        (dict(num_kv_heads=1.5), TypeError, 'num_kv_heads must be an integer'),
        (dict(dropout=1.5), ValueError, r'dropout must be in \[0, 1\), got 1.5'),
        (dict(kdim=8.0), TypeError, 'kdim must be an integer, got 8.0'),
        (dict(vdim=0), ValueError, 'vdim must be at least 1, got 0'),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        GroupedMultiheadAttention(DIM, HEADS, **options)


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (dict(is_causal=True), ValueError, 'is_causal=True needs the attn_mask'),
        (dict(attn_mask=MASK.int()), TypeError, 'attn_mask must be boolean'),
        (dict(attn_mask=[[True]]), TypeError, 'attn_mask must be a tensor, got list'),
        (dict(attn_mask=MASK.T), ValueError, 'attn_mask must have shape'),
        (dict(key_padding_mask=PADDING[:1]), ValueError, 'key_padding_mask must'),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        GroupedMultiheadAttention(DIM, HEADS)(*inputs(), **call)


@pytest.mark.parametrize('wrong', ['query', 'key', 'value'])
def test_wrong_inputs(wrong):
    x = dict(zip(('query', 'key', 'value'), inputs(), strict=True))
    x[wrong] = x[wrong][..., :-1]
    with pytest.raises(ValueError, match=f'{wrong} must have shape'):
        GroupedMultiheadAttention(DIM, HEADS)(**x)
