"""Linformer against its formula, with every way of sharing and at other sizes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from deform_gqa.models import DAT, LinformerAttention, Projection, share_projections
from deform_gqa.models.layers.linformer import SHARING

DIM, HEADS, SIZE, K = 24, 4, (4, 6), 5
# (projections of keys, of values) with two kv heads
COUNTS = {'not-share': (2, 2), 'headwise': (1, 1), 'key-value': (1, 0)}
COUNTS['layerwise'] = COUNTS['key-value']


def make(sharing, **options):
    torch.manual_seed(0)
    options = {**dict(num_kv_heads=2, n=SIZE, k=K), **options}
    return LinformerAttention(DIM, HEADS, sharing=sharing, **options).double()


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def resized(projection, size):
    """The matrix (k, H * W) itself: images resampled, with weights that sum to one."""
    if size == projection.size:
        return projection.proj.weight
    pixels = torch.eye(projection.n, dtype=torch.float64)
    pixels = F.interpolate(
        pixels.unflatten(1, projection.size)[:, None],
        size,
        mode='bilinear',
        align_corners=False,
        antialias=True,
    ).flatten(1)
    return projection.proj.weight @ (pixels / pixels.sum(1, keepdim=True))


def literal(module, tokens, size):
    """softmax(q (E k)^T / sqrt(D)) (F v), one head after the other."""
    keys = module.proj_E
    values = keys if module.proj_F is None else module.proj_F
    group, width = module.num_heads // module.num_kv_heads, module.head_dim
    q, k, v = (p(tokens) for p in (module.proj_q, module.proj_k, module.proj_v))
    outs = []
    for head in range(module.num_heads):
        kv = head // group
        own = slice(head * width, (head + 1) * width)
        shared = slice(kv * width, (kv + 1) * width)
        e, f = keys[kv % len(keys)], values[kv % len(values)]
        k_low = resized(e, size) @ k[..., shared] + e.proj.bias[:, None]
        v_low = resized(f, size) @ v[..., shared] + f.proj.bias[:, None]
        logits = q[..., own] @ k_low.mT / math.sqrt(width)
        outs.append(logits.softmax(-1) @ v_low)
    return module.proj_out(torch.cat(outs, dim=-1))


@pytest.mark.parametrize('size', [SIZE, (3, 9), (11, 7), (1, 2)])
@pytest.mark.parametrize('sharing', SHARING)
def test_literal_formula(sharing, size):
    module = make(sharing)
    x = draw(2, DIM, *size).requires_grad_()
    inputs = [x, *module.parameters()]
    actual = module(x)
    expected = literal(module, x.flatten(2).mT, size).mT.unflatten(2, size)
    assert_close(actual, expected)
    weight = draw(*x.shape)
    for a, b in zip(
        torch.autograd.grad(actual, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize('sharing', SHARING)
def test_number_of_projections(sharing):
    module = make(sharing)
    counts = [0 if p is None else len(p) for p in (module.proj_E, module.proj_F)]
    assert tuple(counts) == COUNTS[sharing]


def test_sequences_of_any_length():
    module = make('headwise', n=12)
    for length in (12, 7, 30):
        tokens = draw(1, length, DIM)
        actual = module.forward_tokens(tokens)
        assert_close(actual, literal(module, tokens, (1, length)))


def test_tokens_of_padding_do_not_count():
    module = make('headwise', n=12)
    tokens, mask = draw(2, 12, DIM), torch.zeros(2, 12, dtype=torch.bool)
    mask[1, 8:] = True
    other = tokens.clone()
    other[1, 8:] = 3.0
    first, second = (module.forward_tokens(t, None, mask) for t in (tokens, other))
    assert_close(first[0], second[0])
    assert_close(first[1, :8], second[1, :8])
    with pytest.raises(ValueError, match=r'key_padding_mask must .*= \(2, 12\)'):
        module.forward_tokens(tokens, None, mask[:, :3])


def test_projection_keeps_the_names_of_the_collection():
    projection = Projection(12, 3)
    assert (projection.n, projection.k) == (12, 3)
    assert set(projection.state_dict()) == {'proj.weight', 'proj.bias'}
    x = torch.randn(2, 4, 12)
    assert_close(projection(x), x @ projection.proj.weight.T + projection.proj.bias)
    assert Projection((3, 4), 2, bias=False).proj.bias is None


def test_a_constant_map_is_projected_alike_at_every_size():
    projection = Projection((5, 4), 3).double()
    values = [
        projection(torch.ones(h * w).double(), (h, w)) for h, w in ((5, 4), (9, 3))
    ]
    assert_close(*values)


class Layers(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(
            LinformerAttention(dim, 2, n=SIZE, k=K, sharing='layerwise', **options)
            for dim in (8, 16, 16)
        )


def test_layerwise_sharing():
    model = Layers()
    share_projections(model)
    share_projections(model)  # a second time changes nothing
    names = [name for name, _ in model.named_parameters() if 'proj_E' in name]
    assert names == ['layers.0.proj_E.0.proj.weight', 'layers.0.proj_E.0.proj.bias']
    model = copy.deepcopy(model)
    x = torch.randn(1, 16, *SIZE)
    before = model.layers[2](x)
    with torch.no_grad():
        model.layers[0].proj_E[0].proj.weight.mul_(2)
    assert not torch.equal(model.layers[2](x), before)
    model.layers[2](x).sum().backward()
    assert model.layers[0].proj_E[0].proj.weight.grad.any()


def test_layers_that_cannot_share():
    model = Layers()
    model.layers.append(LinformerAttention(8, 2, n=9, k=K, sharing='layerwise'))
    with pytest.raises(ValueError, match=r'\(\(4, 6\), 5\) and \(\(1, 9\), 5\)'):
        share_projections(model)


def test_a_backbone_shares_among_its_layers():
    arch = dict(
        embed_dims=(8, 16, 16, 16),
        depths=(1,) * 4,
        num_heads=(2,) * 4,
        block_types=('D',) * 4,
    )
    attention = dict(D=dict(type='LinformerAttention', sharing='layerwise'))
    model = DAT(arch, attention=attention)
    assert sum('proj_E' in name for name in model.state_dict()) == 2
    loss = sum(out.sum() for out in model(torch.randn(1, 3, 64, 96)))
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if 'proj_E' in n)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(sharing='none'), ValueError, "one of .*'key-value'.* got 'none'"),
        (dict(k=0), ValueError, 'k must be at least 1, got 0'),
        (dict(n=2.5), TypeError, 'n must be an integer, got 2.5'),
        (dict(n=(3, 0)), ValueError, r'n must be at least 1, got \(3, 0\)'),
        (dict(proj_E=nn.Linear(2, 2)), TypeError, 'proj_E must be a Projection'),
        (
            dict(sharing='not-share', proj_E=Projection(4, 2)),
            ValueError,
            "proj_E must be None with sharing='not-share'",
        ),
        (
            dict(sharing='key-value', proj_F=Projection(4, 2)),
            ValueError,
            "proj_F must be None with sharing='key-value'",
        ),
        (
            dict(proj_E=Projection(4, 2), proj_F=Projection(4, 3)),
            ValueError,
            r'the same n and k, got .*\(\(1, 4\), 2\) and \(\(1, 4\), 3\)',
        ),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        make(**{**dict(sharing='headwise'), **options})


def test_bad_inputs():
    module = make('headwise')
    with pytest.raises(ValueError, match=r'H \* W = 24 tokens, got \(4, 5\)'):
        module.forward_tokens(draw(1, 24, DIM), (4, 5))
    with pytest.raises(ValueError, match=r'x must have .*= \(1, 24, 24\)'):
        module.forward_tokens(draw(1, 24, 8))
    with pytest.raises(TypeError, match='bias must be a bool, got 1'):
        Projection(4, 2, bias=1)
