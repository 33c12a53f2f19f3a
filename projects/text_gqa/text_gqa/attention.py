"""Grouped-query attention for attention modules of Hugging Face transformers.

A module that has ``num_key_value_groups`` is served by all attention functions of
transformers but the eager ones of T5 and BERT. That one stands here, and one for the
single query of a decoding step, where transformers lets torch repeat the heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, L, heads * D) -> (B, heads, L, D)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def keys_and_values(
    project: Callable[[], tuple[Tensor, Tensor]],
    cache: Cache | None,
    layer_idx: int | None,
    is_cross: bool,
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, Hkv, S, D) of all tokens so far.

    Args:
        project: Computes those of the tokens of this call.
        cache: Receives them and knows the earlier ones; None without. In an
            ``EncoderDecoderCache`` those of cross-attention are computed once.
        layer_idx: Place in the cache.
        is_cross: Whether they come from an encoder.
    """
    own = cache
    if isinstance(cache, EncoderDecoderCache):
        own = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        if is_cross and cache.is_updated.get(layer_idx):
            layer = own.layers[layer_idx]
            return layer.keys, layer.values
    key, value = project()
    if own is not None:
        key, value = own.update(key, value, layer_idx)
        if is_cross and own is not cache:
            cache.is_updated[layer_idx] = True
    return key, value


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the function that the module's config names.

    Args:
        module: Has ``config`` and ``num_key_value_groups``.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, D).
        mask: As that function takes it.
        options: ``scaling``, ``dropout``, ``position_bias`` and what the model passes
            on.

    Returns:
        Output (B, L, Hq * D), and weights (B, Hq, L, S) if the function is eager.
    """
    name = module.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
    if name == 'sdpa' and query.shape[2] == 1:
        function = single_query_sdpa
    out, weights = function(module, query, key, value, mask, **options)
    return out.flatten(2), weights


def single_query_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    position_bias: Tensor | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """torch's SDPA for one query token, which sees all keys that no mask hides.

    The query heads of a group are so many queries of one head: keys and values are read
    once a group, and never repeated.

    Returns:
        Output (B, 1, Hq, D), and None.
    """
    batch, heads, _, head_dim = query.shape
    mask = _added_up(attention_mask, position_bias, query)
    if mask is not None and mask.shape[1] == heads:
        mask = mask.reshape(mask.shape[0], key.shape[1], -1, mask.shape[3])
    stacked = query.reshape(batch, key.shape[1], -1, head_dim)
    out = F.scaled_dot_product_attention(
        stacked, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(batch, 1, heads, head_dim), None


def _added_up(mask: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask, boolean or additive, and a bias, each possibly None, as one."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(like.dtype).min)
    return mask + bias


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    position_bias: Tensor | None = None,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, which hands the weights back.

    The queries of a group stand below each other, so that keys and values are not
    repeated. With as many kv heads as query heads every step is the original's.

    Returns:
        Output (B, L, Hq, D) and weights (B, Hq, L, S) after dropout.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    stacked = query.reshape(batch, kv_heads, -1, head_dim)
    logits = stacked @ key.transpose(2, 3) * scaling
    logits = logits.view(batch, heads, num_queries, num_keys)
    if position_bias is not None:
        logits = logits + position_bias
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = F.dropout(logits.softmax(dim=-1), dropout, training=module.training)
    out = weights.view(batch, kv_heads, -1, num_keys) @ value
    out = out.view(batch, heads, num_queries, head_dim)
    return out.transpose(1, 2), weights
