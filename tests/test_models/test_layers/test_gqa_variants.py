"""Modules of grouped, sparse and key-driven attention."""

import functools
from collections import namedtuple

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn
from torch.testing import assert_close

from deform_gqa.models import (
    DAT,
    GQAAttention,
    GQATransformerEncoder,
    GroupedQueryAttention,
    KeyDrivenGQA,
    SimilarityGQA,
    SparseGQA,
)
from deform_gqa.models.layers.base_attention import BaseAttention
from deform_gqa.ops import group_attention, group_queries

DIM, HEADS = 16, 4
MAP_MODULES = {
    SimilarityGQA: dict(tokens_per_group=5),
    SparseGQA: dict(num_keys=3),
    KeyDrivenGQA: {},
}
# Options with which every pixel attends to all.
DENSE = {
    SimilarityGQA: dict(num_groups=1),
    SparseGQA: dict(num_keys=999),
    KeyDrivenGQA: {},
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def build(module_class, *args, **options):
    torch.manual_seed(0)
    return module_class(*args, **options).double()


@pytest.mark.parametrize(
    'module_class', [*MAP_MODULES, GQAAttention, GQATransformerEncoder]
)
def test_registered(module_class):
    assert MODELS.get(module_class.__name__) is module_class


# Maps


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (7, 5)])
@pytest.mark.parametrize('module_class', MAP_MODULES)
def test_any_map_size(module_class, size):
    module = build(module_class, DIM, HEADS, 2, **MAP_MODULES[module_class])
    assert isinstance(module, BaseAttention)
    x = draw(2, DIM, *size).requires_grad_()
    out = module(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize('module_class', MAP_MODULES)
def test_no_images(module_class):
    """Every parameter has a gradient, which distributed training waits for."""
    module = build(module_class, DIM, HEADS)
    x = draw(0, DIM, 3, 4).requires_grad_()
    module(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in module.parameters())


@pytest.mark.parametrize('module_class', MAP_MODULES)
def test_wrong_channels(module_class):
    with pytest.raises(ValueError, match=rf'x must have .*, {DIM}\), got \(1, 12, 5\)'):
        build(module_class, DIM, HEADS)(draw(1, 5, 3, 4))


@pytest.mark.parametrize('module_class', DENSE)
def test_attention_to_all_is_dense_attention(module_class):
    kv_heads = None if module_class is KeyDrivenGQA else 2
    module = build(module_class, DIM, HEADS, kv_heads, **DENSE[module_class])
    dense = build(GroupedQueryAttention, DIM, HEADS, kv_heads)
    module.load_state_dict(dense.state_dict())
    x = draw(2, DIM, 5, 7)
    assert_close(module(x), dense(x))


@pytest.mark.parametrize(
    'options',
    [dict(tokens_per_group=8), dict(num_groups=4), dict(num_groups=3, num_subgroups=3)],
)
def test_similarity(options):
    module = build(SimilarityGQA, DIM, HEADS, 2, **options)
    x = draw(2, DIM, 5, 7)
    tokens = x.flatten(2).mT
    q, k, v = (
        proj(tokens).unflatten(2, (-1, 4))
        for proj in (module.proj_q, module.proj_k, module.proj_v)
    )
    groups = options.get('num_groups', 5)
    ids = group_queries(q, groups, balanced=True)
    out = group_attention(q, k, v, ids)
    if 'num_subgroups' in options:
        ids = group_queries(q, 3, ids, balanced=True)
        out = group_attention(out, out, out, ids)
    expected = module.proj_out(out.flatten(2)).mT.unflatten(2, (5, 7))
    assert_close(module(x), expected)


def test_a_map_has_no_more_groups_than_pixels():
    few = build(SimilarityGQA, DIM, HEADS, num_groups=6)
    many = build(SimilarityGQA, DIM, HEADS, num_groups=99, num_subgroups=99)
    x = draw(1, DIM, 2, 3)
    assert_close(many(x), few(x))


@pytest.mark.parametrize('module_class', MAP_MODULES)
def test_no_image_depends_on_its_neighbours(module_class):
    module = build(module_class, DIM, HEADS, 2, **MAP_MODULES[module_class])
    x = draw(3, DIM, 6, 4)
    assert_close(module(x)[1:2], module(x[1:2]))


@pytest.mark.parametrize('module_class', MAP_MODULES)
def test_dropout_in_training_only(module_class):
    options = MAP_MODULES[module_class]
    module = build(module_class, DIM, HEADS, attn_drop=0.5, **options)
    x = draw(1, DIM, 6, 6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_in_a_stage():
    arch = dict(embed_dims=(8,) * 4, depths=(1,) * 4, num_heads=(2,) * 4)
    letters = dict(A='SimilarityGQA', B='SparseGQA', C='KeyDrivenGQA')
    attention = {letter: dict(type=name) for letter, name in letters.items()}
    model = DAT(
        dict(arch, block_types=('X', 'A', 'B', 'C')),
        num_kv_heads=1,
        attention=attention,
    )
    outs = model(torch.rand(1, 3, 64, 96))
    assert [type(stage.attns[0]).__name__ for stage in model.stages[1:]] == list(
        letters.values()
    )
    sum(out.sum() for out in outs).backward()


@pytest.mark.parametrize(
    ('module_class', 'options', 'error', 'message'),
    [
        (
            SimilarityGQA,
            dict(num_groups=0),
            ValueError,
            'num_groups must be at least 1',
        ),
        (
            SimilarityGQA,
            dict(num_subgroups=0.5),
            TypeError,
            'num_subgroups must be an integer, got 0.5',
        ),
        (
            SimilarityGQA,
            dict(tokens_per_group=0),
            ValueError,
            'tokens_per_group must be at least 1, got 0',
        ),
        (SparseGQA, dict(num_keys=0), ValueError, 'num_keys must be at least 1, got 0'),
        (
            KeyDrivenGQA,
            dict(num_kv_heads=3),
            ValueError,
            'num_heads must be a multiple',
        ),
    ],
)
def test_wrong_options(module_class, options, error, message):
    with pytest.raises(error, match=message):
        module_class(DIM, HEADS, **options)


# Tokens


@pytest.mark.parametrize('kv_heads', [None, 2])
def test_gqa_attention(kv_heads):
    module = build(GQAAttention, DIM, HEADS, 3, num_kv_heads=kv_heads).eval()
    inputs = [draw(2, 11, DIM, seed=i) for i in range(3)]
    q, k, v = (
        proj(x).unflatten(2, (-1, 4))
        for proj, x in zip(
            (module.q_proj, module.k_proj, module.v_proj), inputs, strict=True
        )
    )
    out = group_attention(q, k, v, group_queries(q, 3))
    assert_close(module(*inputs), module.out_proj(out.flatten(2)))


def test_gqa_attention_has_more_groups_than_tokens():
    module = build(GQAAttention, DIM, HEADS).eval()
    x = draw(2, 5, DIM)
    assert_close(module(x, x, x), module.out_proj(module.v_proj(x)))


@pytest.mark.parametrize('own_strategy', [False, True])
def test_padding_is_in_no_group(own_strategy):
    strategy = functools.partial(group_queries, groups=2) if own_strategy else None
    module = build(GQAAttention, DIM, HEADS, 2, group_strategy=strategy).eval()
    x = draw(2, 11, DIM)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[1, 6:] = True
    out = module(x, x, x, padding)
    assert_close(out[:1], module(x[:1], x[:1], x[:1]))
    assert_close(out[1, 6:], module.out_proj.bias.expand(5, -1))
    if not own_strategy:
        alone = x[1:, :6]
        assert_close(out[1:, :6], module(alone, alone, alone))


def test_functions_of_ones_own():
    module = build(
        GQAAttention,
        DIM,
        HEADS,
        group_strategy=lambda q: q.new_zeros(q.shape[:2]).long(),
        attention_function=lambda q, k, v, ids: v + ids[..., None, None],
    )
    x = draw(2, 5, DIM)
    assert_close(module(x, x, x), module.out_proj(module.v_proj(x)))


def test_dropout_of_gqa_attention():
    module, x = build(GQAAttention, DIM, HEADS, 2, dropout=0.5), draw(1, 9, DIM)
    assert not torch.equal(module(x, x, x), module(x, x, x))


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (lambda m, x: m(x[0], x, x), ValueError, r'q must have shape \(B, N, C\)'),
        (
            lambda m, x: m(x, x[:, 1:], x),
            ValueError,
            r'k must have shape \(B, N, embed',
        ),
        (lambda m, x: m(x, x, x.long()), TypeError, 'v must be a floating tensor'),
        (
            lambda m, x: m(x, x, x, torch.zeros(1, 5)),
            TypeError,
            r'key_padding_mask must be boolean, got torch\.float32',
        ),
        (
            lambda m, x: m(x, x, x, [[False] * 5]),
            TypeError,
            'key_padding_mask must be boolean, got list',
        ),
        (
            lambda m, x: m(x, x, x, torch.zeros(1, 4).bool()),
            ValueError,
            r'key_padding_mask must have shape \(B, N\) = \(1, 5\), got \(1, 4\)',
        ),
        (
            lambda m, x: GQAAttention(DIM, 3),
            ValueError,
            'dim must be a multiple of num',
        ),
        (
            lambda m, x: GQAAttention(DIM, 4, 0),
            ValueError,
            'num_groups must be at least',
        ),
        (
            lambda m, x: GQAAttention(DIM, 4, dropout=16),
            ValueError,
            'dropout must be in',
        ),
    ],
)
def test_wrong_use_of_gqa_attention(call, error, message):
    with pytest.raises(error, match=message):
        call(GQAAttention(DIM, HEADS), torch.rand(1, 5, DIM))


class Encoder(nn.Module):
    """Embeds token ids; tokens that are masked out become zero."""

    def __init__(self, wrap):
        super().__init__()
        self.embedding = nn.Embedding(9, DIM)
        self.wrap = wrap

    def forward(self, inputs, attention_mask=None):
        out = self.embedding(inputs)
        if attention_mask is not None:
            out = out * attention_mask[..., None]
        return self.wrap(out)


Output = namedtuple('Output', 'last_hidden_state pooler_output')


@pytest.mark.parametrize(
    'wrap', [lambda x: x, lambda x: (x, x[:, 0]), lambda x: Output(x, x[:, 0])]
)
def test_encoder(wrap):
    model = build(GQATransformerEncoder, Encoder(wrap), DIM, HEADS, 3).eval()
    ids = torch.randint(9, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    out = model(ids, mask)
    assert out.shape == (2, 7, DIM)
    tokens = model.encoder.embedding(ids[1:, :4])
    expected = tokens + model.gqa_attn(tokens, tokens, tokens)
    assert_close(out[1:, :4], expected)
    assert_close(model(ids[1:, :4]), expected)


def test_encoder_of_a_config():
    encoder = dict(type='GQATransformerEncoder', encoder=nn.Linear(3, 4), embed_dim=8)
    model = MODELS.build(dict(encoder, num_heads=2, num_groups=2, num_kv_heads=1))
    assert model.gqa_attn.num_kv_heads == 1
    nested = dict(type='GQAAttention', embed_dim=8, num_heads=2)
    assert isinstance(GQATransformerEncoder(nested, 8, 2, 2).encoder, GQAAttention)


def test_encoder_that_is_none():
    with pytest.raises(TypeError, match=r"encoder must be an nn\.Module, got 'bert'"):
        GQATransformerEncoder('bert', 8, 2, 2)
