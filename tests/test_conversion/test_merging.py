"""Merging and alignment of heads, on plain tensors."""

import pytest
import torch

from deform_gqa.conversion.heads import AttentionHeads, Freedom, Moments, Projection
from deform_gqa.conversion.merging import MERGES, merge_heads

HEADS, DIM, CHANNELS, OUT = 4, 6, 10, 9
GROUPS = [[0, 1], [2, 3]]
TOKENS = 50


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(bias=True, kv_heads=HEADS):
    def projection(count):
        return Projection(random(count, DIM, CHANNELS), random(count, DIM) * bias)

    return AttentionHeads(
        projection(HEADS),
        projection(kv_heads),
        projection(kv_heads),
        random(HEADS, DIM, OUT),
        random(OUT),
    )


def project(projection, x):
    return torch.einsum('tc,hdc->htd', x, projection.weight) + projection.bias[:, None]


def attend(heads, x, sum_heads=True):
    """Attention of all tokens to all tokens; grouped as query head h // n."""
    share = heads.queries_per_kv_head
    q = project(heads.q, x)
    k, v = (project(p, x).repeat_interleave(share, 0) for p in (heads.k, heads.v))
    weights = (q @ k.mT / DIM**0.5).softmax(-1)
    out = torch.einsum('hts,hsd,hdc->htc', weights, v, heads.out)
    return out.sum(0) + heads.out_bias if sum_heads else out


def error(heads, other, x=None):
    x = random(TOKENS, CHANNELS) if x is None else x
    wanted = attend(heads, x)
    return float((attend(other, x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize('merge', sorted(set(MERGES) - {'random', 'learned'}))
@pytest.mark.parametrize('groups', [GROUPS, [[3, 0], [1, 2]]])
def test_equal_heads_are_merged_exactly(merge, groups):
    heads = make()
    for first, second in groups:
        for side in (heads.k, heads.v):
            side.weight[second], side.bias[second] = (
                side.weight[first],
                side.bias[first],
            )
    merged = merge_heads(heads, groups, merge, freedom=Freedom())
    assert merged.num_kv_heads == 2
    assert error(heads, merged) < 1e-9


def test_sums_of_heads():
    heads = make()
    k, v = heads.k.weight, heads.v.weight
    merged = merge_heads(heads, [[0, 2], [1, 3]])
    torch.testing.assert_close(merged.k.weight[0], (k[0] + k[2]) / 2)
    torch.testing.assert_close(merged.v.weight[1], (v[1] + v[3]) / 2)
    torch.testing.assert_close(
        merged.k.bias[1], (heads.k.bias[1] + heads.k.bias[3]) / 2
    )
    torch.testing.assert_close(merged.q.weight, heads.q.weight[[0, 2, 1, 3]])
    torch.testing.assert_close(merged.out, heads.out[[0, 2, 1, 3]])
    first = merge_heads(heads, [[2, 0], [1, 3]], 'first')
    torch.testing.assert_close(first.k.weight, k[[2, 1]])
    learned = merge_heads(
        heads,
        GROUPS,
        'learned',
        weights=(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.0, 1, -1, 0])),
    )
    torch.testing.assert_close(learned.k.weight[1], 3 * k[2] + 4 * k[3])
    torch.testing.assert_close(learned.v.weight, torch.stack([v[1], -v[2]]))


def test_weights_by_norm():
    heads = make()
    heads.k.weight[0] *= 3
    merged = merge_heads(heads, GROUPS, 'norm')
    norms = heads.k.columns.flatten(1).norm(dim=1)
    share = norms[0] / (norms[0] + norms[1])
    expected = share * heads.k.weight[0] + (1 - share) * heads.k.weight[1]
    torch.testing.assert_close(merged.k.weight[0], expected)


def test_random_heads_keep_the_scale_and_have_no_bias():
    heads = make()
    heads.k.weight.mul_(0.01)
    draws = [
        merge_heads(heads, GROUPS, 'random', generator=torch.Generator().manual_seed(n))
        for n in (1, 1, 2)
    ]
    assert torch.equal(draws[0].k.weight, draws[1].k.weight)
    assert not torch.equal(draws[0].k.weight, draws[2].k.weight)
    torch.testing.assert_close(
        draws[0].k.weight.std(), heads.k.weight.std(), rtol=0.2, atol=0
    )
    assert draws[0].k.bias.count_nonzero() == 0


def test_values_in_groups_of_their_own():
    heads = make()
    merged = merge_heads(heads, [[0, 2], [1, 3]], value_groups=[[0, 3], [1, 2]])
    torch.testing.assert_close(merged.k.weight[0], heads.k.weight[[0, 2]].mean(0))
    torch.testing.assert_close(merged.v.weight[1], heads.v.weight[[1, 2]].mean(0))
    torch.testing.assert_close(merged.q.weight, heads.q.weight[[0, 2, 1, 3]])
    torch.testing.assert_close(merged.out, heads.out[[0, 2, 1, 3]])


def invertible():
    """A well-conditioned matrix that is no rotation, for each head."""
    return random(HEADS, DIM, DIM) / DIM**0.5 + torch.eye(DIM, dtype=torch.float64)


def rotations():
    return torch.linalg.qr(random(HEADS, DIM, DIM))[0]


def rotary():
    angle = random(HEADS, DIM // 2)
    cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
    return torch.cat([torch.cat([cos, -sin], 2), torch.cat([sin, cos], 2)], 1)


def gauged(keys, values):
    """Heads whose keys and values are equal in a group, up to these matrices.

    Queries and output projections are any, and so are the biases of keys and values.
    """
    heads = make()
    for side, change in ((heads.k, keys), (heads.v, values)):
        for first, second in GROUPS:
            side.weight[second] = side.weight[first]
        side.weight.copy_(change @ side.weight)
    return heads


IDENTITY = torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1)


@pytest.mark.parametrize(
    ('merge', 'freedom', 'keys', 'values'),
    [
        ('aligned', Freedom(), invertible, invertible),
        ('rotated', Freedom(), rotations, rotations),
        ('aligned', Freedom('rotary'), rotary, invertible),
        ('rotated', Freedom('rotary'), rotary, rotations),
        ('aligned', Freedom('none'), lambda: IDENTITY, invertible),
        ('rotated', Freedom('none'), lambda: IDENTITY, rotations),
        ('aligned', Freedom(value=False), invertible, lambda: IDENTITY),
    ],
)
@pytest.mark.parametrize('calibrated', [False, True])
def test_alignment_undoes_what_is_allowed(merge, freedom, keys, values, calibrated):
    """Heads that differ by an allowed change alone are merged without error."""
    heads = gauged(keys(), values())
    moments = None
    if calibrated:
        x = torch.cat([random(TOKENS, CHANNELS) + 1, random(TOKENS, 1) * 0 + 1], 1)
        moments = Moments(*[x.T @ x / TOKENS] * 3)
    merged = merge_heads(heads, GROUPS, merge, freedom=freedom, moments=moments)
    assert error(heads, merged) < 1e-6
    assert error(heads, merge_heads(heads, GROUPS, 'mean')) > 0.05


def test_biases_are_exact_freedoms():
    """Heads that differ in the biases of keys and values: merged without error."""
    heads = gauged(IDENTITY, IDENTITY)
    merged = merge_heads(heads, GROUPS, 'aligned', freedom=Freedom('none', False))
    assert error(heads, merged) < 1e-9
    kept = Freedom('none', False, key_bias=False, value_bias=False)
    merged = merge_heads(heads, GROUPS, 'aligned', freedom=kept)
    assert merged.k.bias.count_nonzero() > 0
    assert torch.equal(merged.out_bias, heads.out_bias)


def test_queries_stay_where_something_else_reads_them():
    heads = make()
    merged = merge_heads(heads, GROUPS, 'aligned', freedom=Freedom('none'))
    torch.testing.assert_close(merged.q.columns, heads.q.columns)
    assert not torch.equal(merged.out, heads.out)
    merged = merge_heads(heads, GROUPS, 'aligned', freedom=Freedom(value=False))
    torch.testing.assert_close(merged.out, heads.out)


def logit_error(heads, merged):
    """Squared error of the bilinear forms between inputs of queries and keys."""
    share = HEADS // merged.num_kv_heads
    have = merged.q.columns.mT @ merged.k.weight.repeat_interleave(share, 0)
    return float((have - heads.q.columns.mT @ heads.k.weight).square().sum())


def value_error(heads, merged):
    share = HEADS // merged.num_kv_heads
    have = merged.out.mT @ merged.v.weight.repeat_interleave(share, 0)
    return float((have - heads.out.mT @ heads.v.weight).square().sum())


@pytest.mark.parametrize('measure', [logit_error, value_error])
@pytest.mark.parametrize('query', ['any', 'none'])
def test_aligned_heads_are_the_best(measure, query):
    """No other merge, and no small change of the merged heads, has less error."""
    heads = make()
    freedom = Freedom(query, value=query == 'any')
    merged = merge_heads(heads, GROUPS, 'aligned', freedom=freedom)
    least = measure(heads, merged)
    for merge in ('mean', 'first', 'norm', 'rotated'):
        assert least <= measure(
            heads, merge_heads(heads, GROUPS, merge, freedom=freedom)
        )
    for _ in range(5):
        for part in (merged.k.weight, merged.v.weight):
            change = 1e-3 * random(*part.shape)
            part += change
            assert measure(heads, merged) >= least - 1e-9
            part -= change


def inputs_moment():
    """The second moment of inputs with unequal directions and a mean."""
    scale = torch.linspace(0.1, 3, CHANNELS, dtype=torch.float64)
    x = random(TOKENS, CHANNELS) * scale[torch.randperm(CHANNELS)] + 2
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    return x.T @ x / TOKENS


@pytest.mark.parametrize('query', ['any', 'none'])
def test_alignment_weighs_the_inputs(query):
    """Logits have the least error for the queries there are; means of keys cancel."""
    heads = make()
    q, k = inputs_moment(), inputs_moment()
    centred = k - torch.outer(k[:, -1], k[:, -1])

    def error_with(**moments):
        merged = merge_heads(
            heads, GROUPS, 'aligned', freedom=Freedom(query), moments=Moments(**moments)
        )
        have, want = (
            x.q.columns.mT @ x.k.weight.repeat_interleave(HEADS // x.num_kv_heads, 0)
            for x in (merged, heads)
        )
        change = have - want
        return float((change.mT @ q @ change * centred[:-1, :-1]).sum())

    least = error_with(q=q, k=k)
    assert least < 0.95 * error_with(k=k)
    assert least == pytest.approx(error_with(q=q, k=centred))


def test_merged_weights_keep_their_size():
    heads = make()
    merged = merge_heads(heads, GROUPS, 'aligned', freedom=Freedom())
    for side in ('k', 'v'):
        before = getattr(heads, side).weight.square().mean()
        after = getattr(merged, side).weight.square().mean()
        assert 0.5 < float(after / before) < 2


def test_groups_of_grouped_heads():
    """Each of the 2 kv heads already serves 2 query heads; aligned to one."""
    heads = make(kv_heads=2)
    change = invertible()[:1]
    heads.k.weight[1], heads.v.weight[1] = heads.k.weight[0], heads.v.weight[0]
    heads.k.weight[1:] = change @ heads.k.weight[1:]
    merged = merge_heads(heads, [[1, 0]], 'aligned', freedom=Freedom())
    assert merged.num_kv_heads == 1
    assert error(heads, merged) < 1e-6


def test_dead_heads_do_not_divide_by_zero():
    heads = make()
    heads.k.weight[0] = heads.k.weight[1] = 0
    heads.v.weight[:, 3:] = 0
    for merge in ('norm', 'aligned', 'rotated'):
        merged = merge_heads(heads, GROUPS, merge, freedom=Freedom())
        for part in (merged.q, merged.k, merged.v):
            assert part.columns.isfinite().all()
        assert merged.out.isfinite().all()


def test_wrong_merges():
    with pytest.raises(ValueError, match=r"merge must be one of .* got 'median'"):
        merge_heads(make(), GROUPS, 'median')
    with pytest.raises(ValueError, match="merge='learned' needs weights, got None"):
        merge_heads(make(), GROUPS, 'learned')
