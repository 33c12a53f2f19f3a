"""Grouped-query attention in the (b, n, h, d) layout.

The interface is that of the package grouped-query-attention-pytorch. Where it is at
fault this differs:

- ``average_attn_weights`` averages over the heads, not over the queries;
- ``is_causal=False`` beside a mask is accepted;
- a query whose keys are all masked gets zeros (output and weights), as torch's SDPA
  gives, not the mean over the very keys that were masked.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import checks
from ..common.autocast import without_autocast


def scaled_dot_product_gqa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool | None = None,
    need_weights: bool = False,
    average_attn_weights: bool = False,
    force_grouped: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot product attention with grouped queries.

    Query head i reads key / value head i // (h / h_kv). Differentiable in query, key
    and value, also through the weights.

    Args:
        query: (b, n, h, d), float16, bfloat16, float32 or float64.
        key: (b, s, h_kv, d), dtype of query, h % h_kv == 0.
        value: (b, s, h_kv, d), dtype of query.
        dropout: Dropout of the attention weights, in [0, 1). It is always applied:
            pass 0 in evaluation.
        scale: The query is divided by it. Default sqrt(d).
        mask: Boolean, True where a key may be attended to: (b, s) for all queries and
            heads, (b, n, s) for all heads, or (b, h, n, s). Any of b, h and n may be
            1. A query without any key gets zeros.
        is_causal: Query i attends to keys 0 to i (also where n != s). Not together
            with a mask.
        need_weights: Also return the attention weights. This holds all of them in
            memory; otherwise torch's fused attention runs.
        average_attn_weights: Average the returned weights over the heads.
        force_grouped: Accepted for compatibility, without effect: the results do not
            depend on how the heads are grouped.

    Returns:
        Output (b, n, h, d) in the dtype of query, also under autocast, and weights
        (b, n, s, h) after dropout, or (b, n, s) if averaged, or None.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes or options that do not fit.

    Source: Ainslie et al., "GQA" (arXiv 2305.13245);
    https://github.com/fkodom/grouped-query-attention-pytorch.
    """
    check_inputs(query, key, value)
    checks.check_rate('dropout', dropout)
    scale = _check_divisor(scale, query.shape[3])
    if mask is not None:
        if is_causal:
            raise ValueError('mask must be None with is_causal=True, got both')
        mask = _expand_mask(mask, query, key)
    return attend_grouped(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=bool(is_causal),
        dropout=dropout,
        scale=1 / scale,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
    )


def attend_grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout: float,
    scale: float,
    need_weights: bool,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`scaled_dot_product_gqa` without checks, for modules of this package.

    Differs in ``scale``, which multiplies, and in ``attn_mask``, which broadcasts to
    (b, h, n, s) and is boolean (True: may be attended to) or floating (added to the
    logits; -inf hides).
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(query.dtype)
    with without_autocast(query.device):
        if not need_weights:
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            return out.transpose(1, 2), None
        if is_causal:
            attn_mask = causal_mask(query.shape[2], key.shape[2], query.device)
        weights = F.dropout(_weights(query * scale, key, attn_mask), dropout)
        grouped = weights.unflatten(1, (key.shape[1], -1))
        out = torch.einsum('bkgns,bksd->bkgnd', grouped, value).flatten(1, 2)
        weights = weights.permute(0, 2, 3, 1)
        if average_attn_weights:
            weights = weights.mean(dim=-1)
        return out.transpose(1, 2), weights


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(n, s), True where the key's index is not above the query's."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril_()


def _weights(query: Tensor, key: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Attention weights (b, h, n, s) of scaled queries, softmax in float32."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    logits = torch.einsum('bkgnd,bksd->bkgns', grouped, key).flatten(1, 2)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if attn_mask is None or logits.shape[-1] == 0:
        return logits.softmax(dim=-1).to(query.dtype)
    if attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    else:
        logits = logits + attn_mask
    # A softmax over -inf alone would be nan, and so would its gradient.
    alone = logits.detach().amax(dim=-1, keepdim=True) == -torch.inf
    weights = logits.masked_fill(alone, 0).softmax(dim=-1).masked_fill(alone, 0)
    return weights.to(query.dtype)


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    names: tuple[str, str, str] = ('query', 'key', 'value'),
) -> None:
    """(b, n, h, d) with two (b, s, h_kv, d), h % h_kv == 0, s >= 1, of one dtype.

    Raises:
        TypeError: For a tensor of the wrong dtype.
        ValueError: For shapes that do not fit.
    """
    query_name, key_name, value_name = names
    checks.check_tensor(query_name, query, 'b n h d')
    checks.check_tensor(key_name, key, 'b s h_kv d')
    checks.check_tensor(value_name, value, 'b s h_kv d')
    checks.check_channels(query_name, query)
    batch, _, heads, head_dim = query.shape
    _, num_keys, num_kv_heads, _ = key.shape
    expected = (batch, num_keys, num_kv_heads, head_dim)
    checks.check_shape(key_name, key, expected, '(b, s, h_kv, d)')
    checks.check_shape(value_name, value, expected, '(b, s, h_kv, d)')
    checks.check_same(key_name, key, query_name, query)
    checks.check_same(value_name, value, query_name, query)
    checks.check_heads(heads, num_kv_heads)
    if num_keys == 0:
        raise ValueError(f'{key_name} and {value_name} hold no keys (s == 0)')


def _check_divisor(scale: float | None, head_dim: int) -> float:
    """What the query is divided by: the given scale, or sqrt(head_dim)."""
    if scale is None:
        return head_dim**0.5
    checks.check_number('scale', scale)
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f'scale must be finite and not zero, got {scale}')
    return scale


def _expand_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask of 2, 3 or 4 dimensions as (b or 1, h or 1, n or 1, s)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f'mask must be a boolean tensor (True keeps), got '
            f'{getattr(mask, "dtype", type(mask).__name__)}'
        )
    checks.check_device('mask', mask, 'query', query)
    shape = tuple(mask.shape)
    if mask.ndim == 2:
        mask = mask[:, None, None]
    elif mask.ndim == 3:
        mask = mask[:, None]
    batch, num_queries, heads, _ = query.shape
    num_keys = key.shape[1]
    fits = mask.ndim == 4 and mask.shape[3] == num_keys
    fits = fits and all(
        have in (1, want)
        for have, want in zip(mask.shape, (batch, heads, num_queries), strict=False)
    )
    if not fits:
        raise ValueError(
            f'mask must have shape (b, s), (b, n, s) or (b, h, n, s) with b = {batch}, '
            f'h = {heads}, n = {num_queries}, s = {num_keys}, got {shape}'
        )
    return mask
