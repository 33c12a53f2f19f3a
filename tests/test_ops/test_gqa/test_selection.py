"""Top-k keys and key-driven heads against literal references."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from deform_gqa.ops import (
    key_driven_allocation,
    key_driven_gqa,
    scaled_dot_product_gqa,
    sparse_gqa,
)
from deform_gqa.ops.gqa import selection


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def draw_qkv(kv_heads=4, heads=4, dtype=torch.float64):
    shapes = ((2, 9, heads, 6), (2, 13, kv_heads, 6), (2, 13, kv_heads, 6))
    return [
        draw(*shape, seed=i, dtype=dtype).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def literal_attention(q, k, v, kv_head_of, num_keys):
    """One query and head at a time; ``kv_head_of[b][h]`` is the kv head it reads."""
    out = torch.empty_like(q)
    for b, n, h in itertools.product(*map(range, q.shape[:3])):
        kv = kv_head_of[b][h]
        logits = torch.stack([q[b, n, h] @ key for key in k[b, :, kv]]) / 6**0.5
        chosen = sorted(range(len(logits)), key=lambda s: -logits[s].item())[:num_keys]
        weights = logits[chosen].softmax(0)
        out[b, n, h] = sum(
            w * v[b, s, kv] for w, s in zip(weights, chosen, strict=True)
        )
    return out


def check(out, expected, inputs):
    tolerance = dict(atol=1e-5, rtol=1e-5)
    assert_close(out, expected, **tolerance)
    grad_out = draw(*out.shape, seed=7, dtype=out.dtype)
    found = torch.autograd.grad(out, inputs, grad_out)
    assert_close(found, torch.autograd.grad(expected, inputs, grad_out), **tolerance)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(('kv_heads', 'num_keys'), [(4, 1), (4, 5), (2, 3), (1, 12)])
def test_sparse(kv_heads, num_keys, dtype):
    inputs = draw_qkv(kv_heads, dtype=dtype)
    heads = [[h // (4 // kv_heads) for h in range(4)]] * 2
    expected = literal_attention(*inputs, heads, num_keys)
    check(sparse_gqa(*inputs, num_keys), expected, inputs)


@pytest.mark.parametrize('num_keys', [13, 99])
def test_sparse_with_all_keys_is_attention(num_keys):
    inputs = draw_qkv(2)
    expected = scaled_dot_product_gqa(*inputs)[0]
    check(sparse_gqa(*inputs, num_keys), expected, inputs)


def test_blocks_do_not_show(monkeypatch):
    inputs = draw_qkv()
    expected = sparse_gqa(*inputs, 4)
    monkeypatch.setattr(selection, 'MAX_SPARSE_LOGITS', 2 * 2 * 4 * 13)
    check(sparse_gqa(*inputs, 4), expected, inputs)
    with torch.no_grad():
        assert_close(sparse_gqa(*inputs, 4), expected)


def test_no_queries():
    assert sparse_gqa(draw(2, 0, 4, 6), *draw_qkv()[1:], 4).shape == (2, 0, 4, 6)


@pytest.mark.parametrize('attend', [key_driven_gqa, lambda *x: sparse_gqa(*x, 3)])
def test_no_result_depends_on_neighbours(attend):
    inputs = draw_qkv(2)
    out = attend(*inputs)
    for row in range(2):
        assert_close(out[row], attend(*(x[row : row + 1] for x in inputs))[0])


@pytest.mark.parametrize(
    'attend', [key_driven_gqa, lambda *x, **o: sparse_gqa(*x, 3, **o)]
)
def test_dropout(attend):
    inputs = draw_qkv(2)
    torch.manual_seed(0)
    first, second = (attend(*inputs, dropout=0.5) for _ in range(2))
    assert not torch.equal(first, second)


def keys_of_norm(*norms):
    """(b, s, h_kv, d) whose heads have these norms, for each sample."""
    k = draw(len(norms), 5, len(norms[0]), 3)
    return k / k.norm(dim=(1, 3), keepdim=True) * torch.tensor(norms)[:, None, :, None]


def test_allocation():
    k = keys_of_norm((1.0, 1, 1, 1), (8, 1, 1, 3), (0, 0, 0, 0), (1, 0, 0, 0))
    assert key_driven_allocation(k, 16).tolist() == [
        [4, 4, 4, 4],
        [8, 2, 2, 4],
        [4, 4, 4, 4],
        [13, 1, 1, 1],
    ]
    assert key_driven_allocation(k, 4).tolist() == [[1] * 4] * 4
    assert key_driven_allocation(k[:2], 6).tolist() == [[2, 2, 1, 1], [2, 1, 1, 2]]


def test_key_driven():
    q, k, v = draw_qkv(2, heads=8)
    with torch.no_grad():
        k[0, :, 0] *= 5
        k[1, :, 1] *= 2
    counts = key_driven_allocation(k, 8).tolist()
    assert counts[0] != counts[1]
    heads = [[0] * first + [1] * second for first, second in counts]
    check(key_driven_gqa(q, k, v), literal_attention(q, k, v, heads, 13), (q, k, v))


def test_key_driven_with_equal_norms_is_gqa():
    q, k, v = draw_qkv(2, heads=8)
    k = k / k.norm(dim=(1, 3), keepdim=True)
    assert_close(key_driven_gqa(q, k, v), scaled_dot_product_gqa(q, k, v)[0])


Q = torch.rand(2, 5, 4, 3)


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (
            lambda: sparse_gqa(Q, Q, Q, 0),
            ValueError,
            'num_keys must be at least 1, got 0',
        ),
        (lambda: sparse_gqa(Q, Q, Q, 1.5), TypeError, 'num_keys must be an integer'),
        (lambda: sparse_gqa(Q, Q, Q, 2, dropout=-1), ValueError, 'dropout must be in'),
        (
            lambda: sparse_gqa(Q, Q[:, :0], Q[:, :0], 2),
            ValueError,
            r'k and v hold no keys \(s == 0\)',
        ),
        (lambda: key_driven_gqa(Q, Q, Q, dropout=1), ValueError, 'dropout must be in'),
        (
            lambda: key_driven_allocation(Q, 3),
            ValueError,
            'num_heads must be at least the number of kv heads 4, .* got 3',
        ),
        (
            lambda: key_driven_allocation(Q, 8.0),
            TypeError,
            'num_heads must be an integer',
        ),
        (lambda: key_driven_allocation(Q[0], 8), ValueError, 'k must have shape'),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
