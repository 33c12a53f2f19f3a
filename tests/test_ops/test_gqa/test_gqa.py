"""scaled_dot_product_gqa against the original package and against explicit loops."""

import pytest
import torch
from golden import assert_close, load_golden

from deform_gqa.ops import scaled_dot_product_gqa

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


def make_qkv(n=13, s=21, heads=6, kv_heads=3, dim=8, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, heads, dim), *[(batch, s, kv_heads, dim)] * 2]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for shape in shapes
    ]


def make_mask(kind, n=13, s=21, heads=6, batch=2):
    """None, or a mask of ``kind`` dimensions in which some queries have no keys."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(2)
    shape = {2: (batch, s), 3: (batch, n, s), 4: (batch, heads, n, s)}[kind]
    mask = torch.rand(shape, generator=generator) > 0.4
    mask[0, 0] = False
    return mask


def run(inputs, **options):
    """[out, gradients to query, key and value]."""
    out, _ = scaled_dot_product_gqa(*inputs, **options)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]


@pytest.mark.parametrize('name', ['gqa_causal', 'gqa_cross'])
def test_equals_the_original(name):
    config, arrays = load_golden(name)
    inputs = [arrays[key].clone().requires_grad_() for key in 'qkv']
    out, weights = scaled_dot_product_gqa(
        *inputs, is_causal=config['is_causal'], need_weights=True
    )
    assert_close('out', out, arrays['out'])
    assert_close('weights', weights, arrays['weights'])
    loss = (out * arrays['gout']).sum() + (weights * arrays['gweights']).sum()
    for key, grad in zip('qkv', torch.autograd.grad(loss, inputs), strict=True):
        assert_close(f'grad_{key}', grad, arrays[f'grad_{key}'])
    fused, nothing = scaled_dot_product_gqa(*inputs, is_causal=config['is_causal'])
    assert_close('fused out', fused, arrays['out'])
    assert nothing is None


def loop_over_heads(query, key, value, scale, mask):
    """Each head by itself; mask (b, h, n, s)."""
    group = query.shape[2] // key.shape[2]
    outs, weights = [], []
    for h in range(query.shape[2]):
        logits = query[:, :, h] @ key[:, :, h // group].transpose(1, 2) / scale
        logits = logits.masked_fill(~mask[:, h], torch.finfo(logits.dtype).min)
        weight = logits.softmax(-1) * mask[:, h].any(-1, keepdim=True)
        outs.append(weight @ value[:, :, h // group])
        weights.append(weight)
    return torch.stack(outs, 2), torch.stack(weights, 3)


@pytest.mark.parametrize('kv_heads', [1, 2, 3, 6])
@pytest.mark.parametrize('kind', [None, 2, 3, 4])
@pytest.mark.parametrize('scale', [None, 1.7])
def test_equals_loop_over_heads(kv_heads, kind, scale):
    inputs = make_qkv(kv_heads=kv_heads)
    mask = make_mask(kind)
    full = torch.ones(2, 6, 13, 21, dtype=torch.bool)
    if kind is not None:
        full = full & (mask if kind == 4 else mask.view(2, 1, -1, 21))
    expected = loop_over_heads(*inputs, scale if scale else 8**0.5, full)
    out, weights = scaled_dot_product_gqa(
        *inputs, scale=scale, mask=mask, need_weights=True
    )
    torch.testing.assert_close((out, weights), expected)
    expected_grads = torch.autograd.grad(expected[0].sin().sum(), inputs)
    grads = torch.autograd.grad(out.sin().sum(), inputs)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    ('n', 's', 'is_causal', 'kind'),
    [
        (13, 21, None, None),
        (13, 21, True, None),
        (21, 13, True, None),
        (13, 21, None, 2),
        (13, 21, False, 3),
        (13, 21, None, 4),
    ],
)
def test_both_paths_agree(dtype, n, s, is_causal, kind):
    inputs = make_qkv(n, s, dtype=dtype)
    options = dict(is_causal=is_causal, mask=make_mask(kind))
    fused = run(inputs, **options)
    explicit = run(inputs, **options, need_weights=True)
    for x, y in zip(fused, explicit, strict=True):
        assert x.dtype == y.dtype == dtype
        torch.testing.assert_close(x, y, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize('need_weights', [True, False])
def test_query_without_keys_gets_zeros(need_weights):
    inputs = make_qkv()
    mask = make_mask(3)
    out, weights = scaled_dot_product_gqa(*inputs, mask=mask, need_weights=need_weights)
    assert not out[0, 0].any()
    assert out[0, 1].any()
    if need_weights:
        assert not weights[0, 0].any()
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert grad.isfinite().all()


@pytest.mark.parametrize('n', [5, 21, 30])
def test_causal_is_aligned_with_the_first_key(n):
    query, key, value = make_qkv(n, 21)
    _, weights = scaled_dot_product_gqa(
        query, key, value, is_causal=True, need_weights=True
    )
    seen = torch.arange(21) <= torch.arange(n)[:, None]
    assert torch.equal(
        weights.detach() > 0, seen[None, :, :, None].expand(2, -1, -1, 6)
    )


def test_average_is_over_heads():
    inputs = make_qkv()
    _, weights = scaled_dot_product_gqa(*inputs, need_weights=True)
    _, mean = scaled_dot_product_gqa(
        *inputs, need_weights=True, average_attn_weights=True
    )
    assert mean.shape == (2, 13, 21)
    torch.testing.assert_close(mean, weights.mean(-1))
    torch.testing.assert_close(mean.sum(-1), torch.ones(2, 13, dtype=torch.float64))


def test_broadcast_masks():
    inputs = make_qkv()
    mask = torch.rand(21) > 0.3
    expected, _ = scaled_dot_product_gqa(*inputs, mask=mask.expand(2, -1))
    for shape in [(1, 21), (1, 1, 21), (2, 1, 1, 21), (1, 6, 1, 21)]:
        out, _ = scaled_dot_product_gqa(*inputs, mask=mask.expand(shape))
        torch.testing.assert_close(out, expected)


def test_force_grouped_has_no_effect():
    inputs = make_qkv(kv_heads=6)
    out, _ = scaled_dot_product_gqa(*inputs)
    forced, _ = scaled_dot_product_gqa(*inputs, force_grouped=True)
    assert torch.equal(out, forced)


@pytest.mark.parametrize('need_weights', [True, False])
def test_dropout(need_weights):
    query, key, value = (
        x.detach().expand(2000, -1, -1, -1) for x in make_qkv(3, 5, batch=1)
    )
    expected, _ = scaled_dot_product_gqa(query[:1], key[:1], value[:1])
    torch.manual_seed(0)
    outs, weights = scaled_dot_product_gqa(
        query, key, value, dropout=0.25, need_weights=need_weights
    )
    bound = 5 * outs.std(0) / 2000**0.5  # five standard errors
    assert ((outs.mean(0) - expected[0]).abs() <= bound).all()
    if need_weights:
        assert abs((weights == 0).double().mean() - 0.25) < 0.01


def test_empty_batch():
    inputs = make_qkv(batch=0)
    for need_weights in (True, False):
        out, _ = scaled_dot_product_gqa(*inputs, need_weights=need_weights)
        assert out.shape == (0, 13, 6, 8)


def test_compiles_without_graph_break():
    inputs = make_qkv()
    compiled = torch.compile(
        scaled_dot_product_gqa, backend='aot_eager', fullgraph=True
    )
    for options in (dict(is_causal=True), dict(mask=make_mask(3), need_weights=True)):
        expected, _ = scaled_dot_product_gqa(*inputs, **options)
        torch.testing.assert_close(compiled(*inputs, **options)[0], expected)


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        (dict(query=torch.zeros(2, 13, 6)), ValueError, 'query must have shape'),
        (dict(key=torch.zeros(2, 21, 3)), ValueError, 'key must have shape'),
        (dict(value=torch.zeros(2, 21, 8)), ValueError, 'value must have shape'),
        (dict(query=[[0.0]]), TypeError, 'query must be a torch.Tensor'),
        (dict(query=torch.zeros(2, 13, 6, 8).int()), TypeError, 'query must be a flo'),
        (dict(key=torch.zeros(2, 21, 3, 4)), ValueError, 'key must have shape'),
        (dict(value=torch.zeros(2, 20, 3, 8)), ValueError, 'value must have shape'),
        (dict(key=torch.zeros(2, 21, 3, 8).half()), TypeError, 'key must have the'),
        (dict(value=torch.zeros(2, 21, 3, 8).half()), TypeError, 'value must have'),
        (dict(query=torch.zeros(2, 13, 5, 8)), ValueError, '5 query heads'),
        (
            dict(key=torch.zeros(2, 0, 3, 8), value=torch.zeros(2, 0, 3, 8)),
            ValueError,
            'hold no keys',
        ),
        (
            dict(
                query=torch.zeros(2, 13, 6, 0),
                key=torch.zeros(2, 21, 3, 0),
                value=torch.zeros(2, 21, 3, 0),
            ),
            ValueError,
            r'query must have channels .* got \(2, 13, 6, 0\)',
        ),
        (dict(query=torch.zeros(2, 13, 0, 8)), ValueError, 'the 0 query heads'),
        (dict(dropout=1.0), ValueError, 'dropout must be in'),
        (dict(dropout=None), TypeError, 'dropout must be .* got None'),
        (dict(scale='a'), TypeError, "scale must be .* got 'a' of type str"),
        (dict(scale=torch.tensor(2.0)), TypeError, 'scale must be .* of type Tensor'),
        (dict(scale=0.0), ValueError, 'scale must be finite'),
        (dict(scale=float('nan')), ValueError, 'scale must be finite'),
        (
            dict(mask=torch.ones(2, 21).bool(), is_causal=True),
            ValueError,
            'mask must be None with is_causal=True',
        ),
        (dict(mask=torch.ones(2, 21)), TypeError, 'mask must be a boolean'),
        (dict(mask=[True]), TypeError, 'mask must be a boolean'),
        (dict(mask=torch.ones(21).bool()), ValueError, 'mask must have shape'),
        (dict(mask=torch.ones(2, 20).bool()), ValueError, 'mask must have shape'),
        (dict(mask=torch.ones(2, 12, 21).bool()), ValueError, 'mask must have shape'),
        (dict(mask=torch.ones(2, 3, 13, 21).bool()), ValueError, 'mask must have'),
        (
            dict(mask=torch.ones(2, 21, device='meta').bool()),
            ValueError,
            'mask must be on the device',
        ),
    ],
)
def test_user_errors(changes, error, message):
    names = ('query', 'key', 'value')
    inputs = dict(zip(names, make_qkv(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        scaled_dot_product_gqa(**(inputs | changes))
