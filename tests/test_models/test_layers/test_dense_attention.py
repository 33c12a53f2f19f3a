"""Dense attention: literal references, decoding, the collection's names and forms."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deform_gqa.models import (
    GroupedQueryAttention,
    LinformerAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    Projection,
    SingleHeadAttention,
)
from deform_gqa.models.layers import collection
from deform_gqa.models.layers.collection import MODULES, from_collection

DIM, HEADS = 24, 6
KINDS = {
    SingleHeadAttention: (1, 1),
    MultiHeadAttention: (HEADS, HEADS),
    MultiQueryAttention: (HEADS, 1),
    GroupedQueryAttention: (HEADS, 2),
}


def make(kind, **options):
    torch.manual_seed(0)
    if kind is GroupedQueryAttention:
        options = dict(num_kv_heads=2, **options)
    return kind(DIM, HEADS, **options).double()


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def literal(module, query, memory, mask):
    """softmax(q k^T / sqrt(D)) v, one head after the other.

    mask: True allows; one for all heads, or a tuple of one for each.
    """
    masks = mask if isinstance(mask, tuple) else (mask,) * module.num_heads
    group, width = module.num_heads // module.num_kv_heads, module.head_dim
    q, k, v = (
        x @ proj.weight.T + proj.bias
        for x, proj in (
            (query, module.proj_q),
            (memory, module.proj_k),
            (memory, module.proj_v),
        )
    )
    outs = []
    for head in range(module.num_heads):
        own = slice(head * width, (head + 1) * width)
        shared = slice(head // group * width, (head // group + 1) * width)
        logits = q[..., own] @ k[..., shared].mT / math.sqrt(width)
        outs.append(
            logits.masked_fill(~masks[head], -torch.inf).softmax(-1) @ v[..., shared]
        )
    return module.proj_out(torch.cat(outs, dim=-1))


@pytest.mark.parametrize('head_dim', [None, 5])
@pytest.mark.parametrize('kind', KINDS)
def test_literal_attention(kind, head_dim):
    module = make(kind, head_dim=head_dim)
    assert (module.num_heads, module.num_kv_heads) == KINDS[kind]
    query, memory = draw(2, 7, DIM).requires_grad_(), draw(2, 9, DIM).requires_grad_()
    mask = torch.rand(7, 9) > 0.4
    mask[:, 0] = True
    inputs = [query, memory, *module.parameters()]
    weight = draw(2, 7, DIM)
    actual = module.forward_tokens(query, memory, mask)
    expected = literal(module, query, memory, mask)
    assert_close(actual, expected)
    # 2-D masks of numbers mean the same
    added = torch.zeros(7, 9).masked_fill(~mask, -torch.inf)
    assert_close(module.forward_tokens(query, memory, added), expected)
    for a, b in zip(
        torch.autograd.grad(actual, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        assert_close(a, b)


def test_maps_are_tokens_row_by_row():
    module = make(GroupedQueryAttention)
    x = draw(2, DIM, 3, 5)
    tokens = module.forward_tokens(x.flatten(2).mT)
    assert_close(module(x), tokens.mT.unflatten(2, (3, 5)))


@pytest.mark.parametrize('steps', [(1,) * 6, (3, 1, 2), (6,)])
@pytest.mark.parametrize('kind', KINDS)
def test_decoding_equals_the_causal_forward(kind, steps):
    module = make(kind)
    x = draw(2, 6, DIM)
    cache, outs = None, []
    for part in x.split(steps, dim=1):
        out, cache = module.decode(part, cache)
        outs.append(out)
    assert_close(torch.cat(outs, dim=1), module.forward_tokens(x, is_causal=True))
    assert cache[0].shape == (2, KINDS[kind][1], 6, module.head_dim)


@pytest.mark.parametrize(
    ('options', 'heads'),
    [
        (dict(num_heads=6, n_grouped=3), (6, 3)),
        (dict(num_heads=6, n_query_each_group=3), (6, 2)),
        (dict(num_heads=6, n_grouped=4, n_query_each_group=2), (8, 4)),
        (dict(num_heads=6, num_kv_heads=6, n_grouped=1), (6, 1)),
    ],
)
def test_names_of_the_numbers_of_heads(options, heads):
    module = GroupedQueryAttention(DIM, **options)
    assert (module.num_heads, module.num_kv_heads) == heads


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(n_query_each_group=4), ValueError, 'num_heads=6, n_query_each_group=4'),
        (dict(n_grouped=0), ValueError, 'n_grouped must be at least 1, got 0'),
        (dict(n_grouped=2.0), TypeError, 'n_grouped must be an integer, got 2.0'),
        (dict(n_grouped=4), ValueError, 'num_heads=6, num_kv_heads=4'),
        (dict(head_dim=0), ValueError, 'head_dim must be at least 1, got 0'),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        GroupedQueryAttention(DIM, HEADS, **options)


def test_bad_tokens():
    module = make(GroupedQueryAttention)
    x = draw(1, 4, DIM)
    with pytest.raises(ValueError, match=r'query must have shape \(B, N, C\)'):
        module.forward_tokens(x[0])
    with pytest.raises(ValueError, match=r'key_value must have .*= \(1, 4, 24\)'):
        module.forward_tokens(x, x[..., :8])
    with pytest.raises(ValueError, match='attn_mask must be None with is_causal'):
        mask = torch.ones(4, 4, dtype=torch.bool)
        module.forward_tokens(x, attn_mask=mask, is_causal=True)
    with pytest.raises(ValueError, match='key_value must have the batch size 1 of'):
        module.forward_tokens(x, draw(2, 3, DIM))
    with pytest.raises(ValueError, match=r'x must have shape \(B, N, C\)'):
        module.decode(x[0])
    _, cache = module.decode(x)
    with pytest.raises(ValueError, match=r'cache must be of 2 sequences .*\[1, 1\]'):
        module.decode(draw(2, 1, DIM), cache)


@pytest.mark.parametrize(
    'shape', [(3,), (1, 3), (4, 3), (6, 4, 1), (2, 1, 1, 3), (2, 6, 4, 3)]
)
@pytest.mark.parametrize('dtype', [torch.bool, torch.float32])
def test_masks_broadcast(shape, dtype):
    module = make(GroupedQueryAttention)
    x, memory = draw(2, 4, DIM), draw(2, 3, DIM)
    allowed = (torch.rand(shape) > 0.5).index_fill(-1, torch.tensor(0), True)
    mask = allowed
    if dtype.is_floating_point:
        mask = torch.zeros(shape).masked_fill(~allowed, -torch.inf)
    heads = allowed.expand(2, HEADS, 4, 3).unbind(1)
    out = module.forward_tokens(x, memory, mask)
    assert_close(out, literal(module, x, memory, heads))


@pytest.mark.parametrize(
    ('mask', 'error', 'message'),
    [
        (torch.ones(4, 2) > 0, ValueError, r'= \(2, 6, 4, 3\), got \(4, 2\)'),
        (torch.ones(3, 1, 1) > 0, ValueError, r'attn_mask .*got \(3, 1, 1\)'),
        (torch.ones(1, 2, 6, 4, 3) > 0, ValueError, r'got \(1, 2, 6, 4, 3\)'),
        (torch.ones(4, 3).long(), TypeError, 'attn_mask must be boolean or floating'),
    ],
)
def test_bad_masks(mask, error, message):
    module = make(GroupedQueryAttention)
    with pytest.raises(error, match=message):
        module.forward_tokens(draw(2, 4, DIM), draw(2, 3, DIM), mask)


# The einsum forms of arXiv 1911.02150, as printed there (softmax over the memory).


def paper_one_query(q, k, v):
    return torch.einsum('m,mv->v', torch.einsum('k,mk->m', q, k).softmax(-1), v)


def paper_batched(x, m, mask, p_q, p_k, p_v, p_o):
    q = torch.einsum('bnd,hdk->bhnk', x, p_q)
    if p_k.ndim == 2:
        k, v = torch.einsum('bmd,dk->bmk', m, p_k), torch.einsum('bmd,dv->bmv', m, p_v)
        weights = (torch.einsum('bhnk,bmk->bhnm', q, k) + mask).softmax(-1)
        o = torch.einsum('bhnm,bmv->bhnv', weights, v)
    else:
        k = torch.einsum('bmd,hdk->bhmk', m, p_k)
        v = torch.einsum('bmd,hdv->bhmv', m, p_v)
        weights = (torch.einsum('bhnk,bhmk->bhnm', q, k) + mask).softmax(-1)
        o = torch.einsum('bhnm,bhmv->bhnv', weights, v)
    return torch.einsum('bhnv,hdv->bnd', o, p_o)


def projections(heads, key_width=5, value_width=4):
    """p_q, p_k, p_v, p_o for 3 query heads; no dimension of kv heads for ``()``."""
    return [
        draw(*shape).requires_grad_()
        for shape in (
            (3, 8, key_width),
            (*heads, 8, key_width),
            (*heads, 8, value_width),
            (3, 8, value_width),
        )
    ]


def test_dot_product_attention():
    torch.manual_seed(0)
    q, k, v = draw(5), draw(7, 5), draw(7, 6)
    assert_close(collection.dotProductAttention(q, k, v), paper_one_query(q, k, v))


@pytest.mark.parametrize(
    ('name', 'heads'),
    [('multiheadAttentionBatched', (3,)), ('multiqueryAttentionBatched', ())],
)
@pytest.mark.parametrize('value_width', [4, 5, 7])
def test_batched_forms(name, heads, value_width):
    torch.manual_seed(0)
    tensors = projections(heads, value_width=value_width)
    x, m = draw(2, 4, 8), draw(2, 6, 8)
    mask = torch.zeros(2, 3, 4, 6, dtype=torch.float64)
    mask[1, :, 0, 2:] = -torch.inf
    actual = getattr(collection, name)(x, m, mask, *tensors)
    expected = paper_batched(x, m, mask, *tensors)
    assert_close(actual, expected)
    weight = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(actual, tensors, weight),
        torch.autograd.grad(expected, tensors, weight),
        strict=True,
    ):
        assert_close(a, b)


def test_multi_head_attention_of_one_query():
    torch.manual_seed(0)
    tensors, x, m = projections((3,)), draw(8), draw(6, 8)
    expected = paper_batched(x[None, None], m[None], 0, *tensors)[0, 0]
    assert_close(collection.multiheadAttention(x, m, *tensors), expected)


@pytest.mark.parametrize(
    ('name', 'heads'),
    [
        ('multiheadSelfAttentionIncremental', (3,)),
        ('multiquerySelfAttentionIncremental', ()),
    ],
)
def test_incremental_forms(name, heads):
    torch.manual_seed(0)
    tensors, x = projections(heads), draw(2, 5, 8)
    keys, values = draw(2, *heads, 0, 5), draw(2, *heads, 0, 4)
    outs = []
    for token in x.unbind(1):
        out, keys, values = getattr(collection, name)(token, keys, values, *tensors)
        outs.append(out)
    later = torch.full((5, 5), -torch.inf).triu(1)
    assert_close(torch.stack(outs, 1), paper_batched(x, x, later, *tensors))
    assert keys.shape == (2, *heads, 5, 5) and values.shape == (2, *heads, 5, 4)


def test_projections_that_do_not_fit():
    x = draw(1, 2, 8)
    p_q, p_k, p_v, p_o = projections((2,))
    with pytest.raises(ValueError, match='got 2, 2 and 3'):
        collection.multiheadAttention(x, x, p_q, p_k, p_v, p_o)


class Head(nn.Module):
    """One head of the collection: projections with biases, no output projection."""

    def __init__(self, queries):
        super().__init__()
        self.query = nn.ModuleList(nn.Linear(DIM, 4) for _ in range(queries))
        self.key, self.value = nn.Linear(DIM, 4), nn.Linear(DIM, 4)

    def forward(self, x):
        k, v = self.key(x), self.value(x)
        return torch.cat(
            [(query(x) @ k.mT / 2).softmax(-1) @ v for query in self.query], dim=-1
        )


@pytest.mark.parametrize(
    ('name', 'arguments', 'kv_heads', 'queries'),
    [
        ('Attention', {}, 1, 1),
        ('MultiheadAttention', dict(n_head=3), 3, 1),
        ('MultiQueryAttention', dict(n_query=3), 1, 3),
        ('GroupedQueryAttention', dict(n_grouped=2, n_query_each_group=3), 2, 3),
    ],
)
def test_modules_by_their_names_in_the_collection(name, arguments, kv_heads, queries):
    """Head by head, as the collection computes them, up to the output projection."""
    torch.manual_seed(0)
    module = from_collection(name, word_size=DIM, embed_dim=4, **arguments)
    heads = [Head(queries) for _ in range(kv_heads)]
    for kind in ('weight', 'bias'):
        for projection, parts in (
            (module.proj_q, [query for head in heads for query in head.query]),
            (module.proj_k, [head.key for head in heads]),
            (module.proj_v, [head.value for head in heads]),
        ):
            joined = torch.cat([getattr(part, kind) for part in parts]).data
            getattr(projection, kind).data.copy_(joined)
    x = torch.randn(2, 5, DIM)
    expected = module.proj_out(torch.cat([head(x) for head in heads], dim=-1))
    assert_close(module.forward_tokens(x), expected)


def test_linformers_by_their_names_in_the_collection():
    E, F = Projection(12, 3), Projection(12, 3)
    alone = from_collection('LinearSelfAttention', word_size=DIM, n=12)
    assert (alone.num_heads, alone.head_dim, alone.proj_E[0].k) == (1, 64, 3)
    given = from_collection('Linformer', word_size=DIM, proj_E=E, proj_F=F)
    assert given.proj_E[0] is E and given.proj_F[0] is F
    for sharing in ('not-share', 'headwise', 'key-value', 'layerwise'):
        module = from_collection(
            'MultiheadLinformer', n_head=2, proj_E=E, proj_F=F, sharing=sharing
        )
        assert isinstance(module, LinformerAttention) and module.sharing == sharing
        sizes = {(p.n, p.k) for p in module.modules() if isinstance(p, Projection)}
        assert sizes == {(12, 3)}
        assert module.forward_tokens(torch.randn(1, 9, 512)).shape == (1, 9, 512)


@pytest.mark.parametrize(
    ('name', 'arguments', 'error', 'message'),
    [
        ('FlashAttention', {}, ValueError, f'one of .*{next(iter(MODULES))}'),
        ('Attention', dict(n_head=2), TypeError, "takes .*word_size.* got 'n_head'"),
        ('Linformer', {}, TypeError, 'Linformer needs proj_E'),
        ('LinearSelfAttention', {}, TypeError, 'LinearSelfAttention needs n'),
    ],
)
def test_bad_names_of_the_collection(name, arguments, error, message):
    with pytest.raises(error, match=message):
        from_collection(name, **arguments)
