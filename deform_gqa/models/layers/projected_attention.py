"""Attention with projections given as tensors, for a query, a sequence, or a step.

Their heads are grouped: the projections of keys and values have fewer heads than that
of the queries, or no dimension of heads at all where one serves all queries. Logits are
not scaled, as in the source, which puts the scale into the projection of the queries.

Source: Shazeer, "Fast Transformer Decoding" (arXiv 1911.02150), sections 2 and 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense_attention import attend_heads


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(k q) v for one query.

    Args:
        q: (K,).
        k: (M, K).
        v: (M, V).

    Returns:
        (V,).
    """
    return _attend(q[None, None, None], k[None, None], v[None, None])[0, 0, 0]


def projected_attention(
    x: Tensor,
    memory: Tensor,
    p_q: Tensor,
    p_k: Tensor,
    p_v: Tensor,
    p_o: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of queries x to a memory.

    Args:
        x: (B, N, C), or (C,) for one query.
        memory: (B, M, C), or (M, C) beside one query.
        p_q: (Hq, C, K).
        p_k: (Hkv, C, K) with Hq % Hkv == 0, or (C, K) for one kv head.
        p_v: (Hkv, C, V), or (C, V).
        p_o: (Hq, C, V).
        mask: Added to the logits; broadcasts to (B, Hq, N, M).

    Returns:
        As x.

    Raises:
        ValueError: For heads that do not divide, or differ between keys and values.
    """
    if x.ndim == 1:
        one = projected_attention(x[None, None], memory[None], p_q, p_k, p_v, p_o, mask)
        return one[0, 0]
    p_k, p_v = _with_heads(p_q, p_k, p_v)
    q = torch.einsum('bnc,hck->bhnk', x, p_q)
    k = torch.einsum('bmc,hck->bhmk', memory, p_k)
    v = torch.einsum('bmc,hcv->bhmv', memory, p_v)
    return torch.einsum('bhnv,hcv->bnc', _attend(q, k, v, mask), p_o)


def projected_attention_step(
    x: Tensor,
    prev_k: Tensor,
    prev_v: Tensor,
    p_q: Tensor,
    p_k: Tensor,
    p_v: Tensor,
    p_o: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention of the next token of each sequence to the past and itself.

    Args:
        x: (B, C).
        prev_k: (B, Hkv, M, K), or (B, M, K) if ``p_k`` has no heads.
        prev_v: (B, Hkv, M, V), or (B, M, V).
        p_q, p_k, p_v, p_o: As in :func:`projected_attention`.

    Returns:
        (B, C), and the keys and values with those of x, M + 1 in number.

    Raises:
        ValueError: For heads that do not divide, or differ between keys and values.
    """
    headless = p_k.ndim == 2
    p_k, p_v = _with_heads(p_q, p_k, p_v)
    if headless:
        prev_k, prev_v = prev_k.unsqueeze(1), prev_v.unsqueeze(1)
    q = torch.einsum('bc,hck->bhk', x, p_q).unsqueeze(2)
    k, v = (
        torch.cat([past, torch.einsum('bc,hck->bhk', x, p).unsqueeze(2)], dim=2)
        for past, p in ((prev_k, p_k), (prev_v, p_v))
    )
    out = torch.einsum('bhv,hcv->bc', _attend(q, k, v).squeeze(2), p_o)
    return (out, k.squeeze(1), v.squeeze(1)) if headless else (out, k, v)


def _with_heads(p_q: Tensor, p_k: Tensor, p_v: Tensor) -> tuple[Tensor, Tensor]:
    p_k, p_v = (p.unsqueeze(0) if p.ndim == 2 else p for p in (p_k, p_v))
    heads = len(p_q), len(p_k), len(p_v)
    if heads[1] != heads[2] or heads[0] % heads[1]:
        raise ValueError(
            'p_k and p_v must have as many heads as each other, which divide those of '
            f'p_q, got {heads[1]}, {heads[2]} and {heads[0]}'
        )
    return p_k, p_v


def _attend(q, k, v, mask: Tensor | None = None) -> Tensor:
    if v.shape[3] > k.shape[3]:
        # Zeros add nothing to a product.
        pad = (0, v.shape[3] - k.shape[3])
        q, k = F.pad(q, pad), F.pad(k, pad)
    return attend_heads(q, k, v, attn_mask=mask, scale=1.0)
