"""Grouping by similarity, and attention within groups, against masks and loops."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from deform_gqa.ops import (
    custom_gqa,
    dynamic_gqa,
    group_attention,
    group_queries,
    groups_for_length,
    hierarchical_gqa,
    scaled_dot_product_gqa,
)
from deform_gqa.ops.gqa import query_groups

BATCH, TOKENS, HEADS, DIM = 2, 23, 4, 6


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def draw_qkv(kv_heads=HEADS, tokens=TOKENS):
    heads = (HEADS, kv_heads, kv_heads)
    return [
        draw(BATCH, tokens, h, DIM, seed=i).requires_grad_()
        for i, h in enumerate(heads)
    ]


def masked(q, k, v, ids):
    """Attention to all tokens, with a mask for the groups."""
    same = (ids[:, :, None] == ids[:, None]) & (ids[:, None] >= 0)
    return scaled_dot_product_gqa(q, k, v, mask=same)[0]


def clusters(sizes, noise=0.05):
    """(tokens, labels) around orthogonal directions, in a random order."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    labels = labels[order]
    x = torch.eye(8, dtype=torch.float64)[labels] + noise * draw(len(labels), 8)
    return x * draw(len(labels), 1).abs().add(0.1), labels


def sizes_of(ids, groups):
    return [[(row == g).sum().item() for g in range(groups)] for row in ids]


# Grouping


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_for_storage_only(dtype):
    x = draw(4, 200, 16).to(dtype)
    assert torch.equal(group_queries(x, 8), group_queries(x.float(), 8))


@pytest.mark.parametrize('sizes', [(5, 5, 5), (1, 20, 3, 9), (12,)])
def test_separate_clusters_are_the_groups(sizes):
    x, labels = clusters(sizes)
    [ids] = group_queries(x[None], len(sizes))
    same = labels[:, None] == labels
    assert torch.equal(ids[:, None] == ids, same)


def test_length_of_a_token_is_nothing():
    x = draw(1, 30, 8)
    scaled = x * draw(1, 30, 1, seed=1).abs().add(0.1)
    assert torch.equal(group_queries(scaled, 4), group_queries(x, 4))


def test_heads_are_taken_together():
    q = draw(2, 30, 4, 2)
    assert torch.equal(group_queries(q, 3), group_queries(q.flatten(2), 3))


def test_more_iterations_give_more_similar_groups():
    x = F.normalize(draw(4, 200, 8), dim=-1)

    def likeness(iterations):
        ids = group_queries(x, 10, iterations=iterations)
        member = F.one_hot(ids, 10).double()
        centres = F.normalize(member.mT @ x, dim=-1)
        return (member @ centres * x).sum(-1).mean()

    assert likeness(0) < likeness(1) < likeness(5)


def test_groups_without_tokens_keep_their_centres():
    x = F.normalize(draw(1, 6, 4), dim=-1)
    centres = F.normalize(draw(1, 1, 3, 4, seed=1), dim=-1)
    ids = torch.tensor([[0, 0, 2, 2, 2, -1]])
    moved = query_groups._moved(x, centres, ids)[0, 0]
    assert_close(moved[0], F.normalize(x[0, :2].sum(0), dim=0))
    assert torch.equal(moved[1], centres[0, 0, 1])
    assert_close(moved[2], F.normalize(x[0, 2:5].sum(0), dim=0))


@pytest.mark.parametrize(('tokens', 'groups'), [(24, 4), (23, 4), (7, 7), (9, 1)])
def test_balanced_groups(tokens, groups):
    ids = group_queries(draw(3, tokens, 8), groups, balanced=True)
    for sizes in sizes_of(ids, groups):
        assert sum(sizes) == tokens and max(sizes) - min(sizes) <= 1


def test_balanced_groups_keep_clusters_together():
    x, labels = clusters((6, 6, 6, 6))
    [ids] = group_queries(x[None], 4, balanced=True)
    assert torch.equal(ids[:, None] == ids, labels[:, None] == labels)


@pytest.mark.parametrize('balanced', [False, True])
def test_second_level_divides_the_first(balanced):
    x = draw(2, 40, 8)
    coarse = group_queries(x, 3, balanced=balanced)
    fine = group_queries(x, 4, coarse, balanced=balanced)
    assert torch.equal(fine // 4, coarse)
    # A parent is divided as if it were alone.
    for row in range(2):
        for parent in range(3):
            inside = coarse[row] == parent
            alone = group_queries(x[row, inside][None], 4, balanced=balanced)
            assert torch.equal(fine[row, inside] % 4, alone[0])


@pytest.mark.parametrize('balanced', [False, True])
def test_groups_of_a_sample_are_its_own(balanced):
    """Neither neighbours nor padding change them, nor how many groups these have."""
    x = draw(3, 40, 8)
    length = torch.tensor([40, 17, 9])
    groups = torch.tensor([5, 3, 2])
    mask = torch.arange(40) < length[:, None]
    x = x.masked_fill(~mask[..., None], 1e3)
    ids = group_queries(x, groups, mask=mask, balanced=balanced)
    assert torch.equal(ids == -1, ~mask)
    for row, n, g in zip(range(3), length, groups, strict=True):
        alone = group_queries(x[row : row + 1, :n], int(g), balanced=balanced)
        assert torch.equal(ids[row, :n], alone[0])


def test_parents_of_none_and_padding():
    parents = torch.tensor([[0, 0, -1, 1, 1]])
    mask = torch.tensor([[True, False, True, True, True]])
    ids = group_queries(draw(1, 5, 4), 2, parents, mask=mask)
    assert (ids == -1).tolist() == [[False, True, True, False, False]]
    assert group_queries(draw(2, 3, 4), 2, mask=torch.zeros(2, 3).bool()).eq(-1).all()


def test_no_tokens():
    assert group_queries(draw(2, 0, 4), 1).shape == (2, 0)
    q = draw(0, 5, 4, 3)
    assert group_attention(q, q, q, torch.zeros(0, 5).int()).shape == q.shape
    assert hierarchical_gqa(q, q, q, 2, 2).shape == q.shape


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_grouping_in_low_precision(dtype):
    x, labels = clusters((5, 9, 3))
    [ids] = group_queries(x[None].to(dtype), 3)
    assert torch.equal(ids[:, None] == ids, labels[:, None] == labels)


def test_autocast_changes_no_group():
    x = draw(1, 1000, 32, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        ids = group_queries(x, 12)
    assert torch.equal(ids, group_queries(x, 12))


# Attention within groups


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('groups', [1, 3, 10])
def test_group_attention_is_masked_attention(groups, kv_heads):
    q, k, v = draw_qkv(kv_heads)
    ids = torch.randint(
        -1, groups, (BATCH, TOKENS), generator=torch.Generator().manual_seed(groups)
    )
    out, expected = group_attention(q, k, v, ids), masked(q, k, v, ids)
    assert_close(out, expected)
    grad_out = draw(*out.shape, seed=5)
    found = torch.autograd.grad(out, (q, k, v), grad_out)
    assert_close(found, torch.autograd.grad(expected, (q, k, v), grad_out))


def test_groups_of_very_different_sizes():
    """One large, many of one token, one that is empty in a sample."""
    ids = torch.tensor([[0] * 15 + [1, 2, 3, 4, 5, 6, 9, 9], [0] * 3 + [7] * 20])
    q, k, v = draw_qkv()
    assert_close(group_attention(q, k, v, ids), masked(q, k, v, ids))


def test_sizes_that_are_known():
    q, k, v = draw_qkv()
    ids = group_queries(q, 4, balanced=True)
    expected = group_attention(q, k, v, ids)
    assert_close(group_attention(q, k, v, ids, group_sizes=[6] * 4), expected)


def test_no_token_is_in_a_group():
    q, k, v = draw_qkv()
    out = group_attention(q, k, v, torch.full((BATCH, TOKENS), -1))
    assert not out.any()
    out.sum().backward()
    assert not q.grad.any()


def test_dropout():
    q, k, v = draw_qkv()
    ids = group_queries(q, 2)
    torch.manual_seed(0)
    first, second = (group_attention(q, k, v, ids, dropout=0.5) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize('kv_heads', [2, 4])
def test_hierarchical(kv_heads):
    q, k, v = draw_qkv(kv_heads)
    coarse = group_queries(q, 3)
    fine = group_queries(q, 2, coarse)
    first = masked(q, k, v, coarse)
    expected = masked(first, first, first, fine)
    out = hierarchical_gqa(q, k, v, 3, 2)
    assert_close(out, expected)
    grad_out = draw(*out.shape, seed=5)
    found = torch.autograd.grad(out, (q, k, v), grad_out)
    assert_close(found, torch.autograd.grad(expected, (q, k, v), grad_out))


@pytest.mark.parametrize(
    'attend',
    [
        functools.partial(dynamic_gqa, tokens_per_group=6),
        functools.partial(dynamic_gqa, tokens_per_group=6, balanced=False),
        functools.partial(hierarchical_gqa, num_groups_1=3, num_groups_2=2),
    ],
)
def test_no_result_depends_on_neighbours_or_padding(attend):
    q, k, v = draw_qkv(2)
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [14]])
    out = attend(q, k, v, mask=mask)
    for row, length in enumerate((TOKENS, 14)):
        alone = attend(*(x[row : row + 1, :length] for x in (q, k, v)))
        assert_close(out[row : row + 1, :length], alone)
    assert not out[1, 14:].any()
    # Nor on what stands in the padding.
    q, k, v = (x.detach().clone() for x in (q, k, v))
    for x in (q, k, v):
        x[1, 14:] = 7.0
    assert_close(attend(q, k, v, mask=mask), out)


def test_number_of_groups_by_length():
    assert [groups_for_length(n, 8) for n in (0, 1, 8, 9, 64)] == [1, 1, 1, 2, 8]
    lengths = torch.tensor([0, 8, 9])
    assert groups_for_length(lengths, 8).tolist() == [1, 1, 2]
    q, k, v = draw_qkv()
    ids = group_queries(q, 3, balanced=True)
    assert_close(dynamic_gqa(q, k, v, tokens_per_group=8), masked(q, k, v, ids))


def test_custom():
    q, k, v = draw_qkv()
    strategy = functools.partial(group_queries, groups=3)
    expected = masked(q, k, v, strategy(q))
    assert_close(custom_gqa(q, k, v, strategy, group_attention), expected)
    assert_close(custom_gqa(q, k, v, strategy, masked), expected)


# Errors

Q = torch.rand(2, 5, 4, 3)
IDS = torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (
            lambda: group_queries(Q, 6),
            ValueError,
            'at most the number of tokens 5, got 6',
        ),
        (lambda: group_queries(Q, 0), ValueError, 'groups must be at least 1, got 0'),
        (
            lambda: group_queries(Q, 2.0),
            TypeError,
            'groups must be an integer, got 2.0',
        ),
        (
            lambda: group_queries(Q, torch.ones(2)),
            TypeError,
            'groups must be integers, got dtype torch.float32',
        ),
        (
            lambda: group_queries(Q, torch.tensor([1, 6])),
            ValueError,
            r'groups must be from 1 to the number of tokens 5, got \[1, 6\]',
        ),
        (
            lambda: group_queries(Q, torch.tensor([1])),
            ValueError,
            r'groups must have shape \(b,\) = \(2,\), got \(1,\)',
        ),
        (lambda: group_queries(Q[0, 0], 1), ValueError, r'queries must have shape'),
        (
            lambda: group_queries(Q[..., :0], 1),
            ValueError,
            'queries must have channels',
        ),
        (lambda: group_queries(Q.long(), 1), TypeError, 'queries must be a floating'),
        (
            lambda: group_queries(Q, 1, balanced=1),
            TypeError,
            'balanced must be a bool, got 1',
        ),
        (
            lambda: group_queries(Q, 1, iterations=-1),
            ValueError,
            'iterations must be at least 0, got -1',
        ),
        (
            lambda: group_queries(Q, 1, mask=IDS),
            TypeError,
            r'mask must be a boolean tensor \(True keeps\), got torch.int64',
        ),
        (
            lambda: group_queries(Q, 1, mask=IDS[:1].bool()),
            ValueError,
            r'mask must have shape \(b, n\) = \(2, 5\), got \(1, 5\)',
        ),
        (
            lambda: group_attention(Q, Q, Q, IDS - 2),
            ValueError,
            'group_ids must be at least -1, got -2',
        ),
        (
            lambda: group_attention(Q, Q, Q, IDS.float()),
            TypeError,
            'group_ids must be integers, got dtype torch.float32',
        ),
        (
            lambda: group_attention(Q, Q, Q, [0] * 5),
            TypeError,
            r'group_ids must be a torch\.Tensor, got list',
        ),
        (
            lambda: group_attention(Q, Q, Q, IDS[:, :3]),
            ValueError,
            r'group_ids must have shape \(b, n\) = \(2, 5\), got \(2, 3\)',
        ),
        (
            lambda: group_attention(Q, Q[:, :3], Q[:, :3], IDS),
            ValueError,
            'k and v must have the 5 tokens of q, whose groups they share, got 3',
        ),
        (
            lambda: group_attention(Q, Q[:, :, :3], Q[:, :, :3], IDS),
            ValueError,
            'the 4 query heads must be a positive multiple of the kv heads, got 3',
        ),
        (
            lambda: group_attention(Q, Q, Q, IDS, dropout=1),
            ValueError,
            'dropout must be',
        ),
        (
            lambda: groups_for_length(9, 0),
            ValueError,
            'tokens_per_group must be at least 1, got 0',
        ),
        (
            lambda: custom_gqa(Q, Q, Q, 3, group_attention),
            TypeError,
            'group_strategy must be a function, got 3 of type int',
        ),
        (
            lambda: custom_gqa(Q, Q, Q, lambda q: IDS, None),
            TypeError,
            'attention_function must be a function, got None',
        ),
        (
            lambda: custom_gqa(Q, Q, Q, lambda q: q, group_attention),
            TypeError,
            'group_ids must be integers',
        ),
        (
            lambda: custom_gqa(Q, Q, Q, lambda q: IDS, lambda q, k, v, ids: q[:, 1:]),
            ValueError,
            r'the output of attention_function must have shape \(b, n, h, d\) of q',
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
