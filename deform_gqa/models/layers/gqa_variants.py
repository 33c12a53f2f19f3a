"""Modules of the attention that groups tokens, or chooses keys or heads.

The functions beneath are those of :mod:`deform_gqa.ops.gqa`. ``SimilarityGQA``,
``SparseGQA`` and ``KeyDrivenGQA`` map (B, C, H, W) to (B, C, H, W) and can stand in any
stage; their state_dict is that of ``GroupedQueryAttention``. ``GQAAttention`` and
``GQATransformerEncoder`` are for tokens and have the names of the tutorial that they
come from.
"""

import functools
import math
from collections.abc import Callable

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_int, check_rate, describe
from deform_gqa.ops.common import checks
from deform_gqa.ops.gqa import (
    custom_gqa,
    group_attention,
    group_queries,
    groups_for_length,
    key_driven_gqa,
    sparse_gqa,
)

from .base_attention import BaseAttention, resolve_kv_heads


class _PixelAttention(BaseAttention):
    """Attention of the pixels of a map.

    A subclass defines which attend to which: ``attend`` maps q (B, N, Hq, D) and k, v
    (B, N, Hkv, D) to (B, N, Hq, D).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        attn_drop: float,
        proj_drop: float,
    ):
        super().__init__(dim, num_heads, num_kv_heads, attn_drop, proj_drop)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, self.kv_dim)
        self.proj_v = nn.Linear(dim, self.kv_dim)
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        expected = (*tokens.shape[:2], self.dim)
        checks.check_shape('the pixels of x', tokens, expected, '(B, H * W, dim)')
        q, k, v = (
            proj(tokens).unflatten(2, (-1, self.head_dim))
            for proj in (self.proj_q, self.proj_k, self.proj_v)
        )
        out = self.proj_drop(self.proj_out(self.attend(q, k, v).flatten(2)))
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


@MODELS.register_module()
class SimilarityGQA(_PixelAttention):
    """Each pixel attends to those like it, (B, C, H, W) -> (B, C, H, W).

    Pixels are grouped by the similarity of their queries, into groups of the same size.
    The number of groups grows with the map, and the time of the attention only with it.
    Finding the groups takes a time that grows with both.

    Args:
        dim: Number of channels C.
        num_heads: Query heads Hq.
        num_kv_heads: Key/value heads; None for ``num_heads``.
        num_groups: Number of groups; None for one for each ``tokens_per_group``. A map
            of fewer pixels has as many groups as pixels.
        tokens_per_group: Pixels of a group where ``num_groups`` is None.
        num_subgroups: If given, the outputs attend once more to each other, within as
            many parts of each group.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For head counts that do not divide, other counts below 1, or a rate
            out of range.

    Source: as :mod:`deform_gqa.ops.gqa.query_groups`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        num_groups: int | None = None,
        tokens_per_group: int = 256,
        num_subgroups: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, num_kv_heads, attn_drop, proj_drop)
        check_int('tokens_per_group', tokens_per_group, 1)
        if num_groups is not None:
            check_int('num_groups', num_groups, 1)
        if num_subgroups is not None:
            check_int('num_subgroups', num_subgroups, 1)
        self.num_groups = num_groups
        self.tokens_per_group = tokens_per_group
        self.num_subgroups = num_subgroups

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[1]
        groups = self.num_groups
        if groups is None:
            groups = groups_for_length(length, self.tokens_per_group)
        groups = min(groups, length)
        ids = group_queries(q, groups, balanced=True)
        out = self._attend_groups(q, k, v, ids, groups, length)
        if self.num_subgroups is None:
            return out
        size = math.ceil(length / groups)
        parts = min(self.num_subgroups, size)
        ids = group_queries(q, parts, ids, balanced=True)
        return self._attend_groups(out, out, out, ids, groups * parts, groups * size)

    def _attend_groups(self, q, k, v, ids, groups: int, places: int) -> Tensor:
        sizes = [math.ceil(places / groups)] * groups
        return group_attention(q, k, v, ids, dropout=self.dropout_p, group_sizes=sizes)


@MODELS.register_module()
class SparseGQA(_PixelAttention):
    """Each pixel attends to the keys with its largest logits, maps in, maps out.

    Args:
        dim: Number of channels C.
        num_heads: Query heads Hq.
        num_kv_heads: Key/value heads; None for ``num_heads``.
        num_keys: Keys of a query and head; all where the map has fewer pixels.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For head counts that do not divide, no keys, or a rate out of range.

    Source: as :func:`deform_gqa.ops.sparse_gqa`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        num_keys: int = 64,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, num_kv_heads, attn_drop, proj_drop)
        check_int('num_keys', num_keys, 1)
        self.num_keys = num_keys

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_gqa(q, k, v, self.num_keys, dropout=self.dropout_p)


@MODELS.register_module()
class KeyDrivenGQA(_PixelAttention):
    """Dense attention; the image's keys say which query heads read which kv head.

    (B, C, H, W) -> (B, C, H, W). With ``num_kv_heads=num_heads`` there is nothing to
    choose, and this is multi-head attention.

    Args:
        dim: Number of channels C.
        num_heads: Query heads Hq.
        num_kv_heads: Key/value heads; None for ``num_heads``.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For head counts that do not divide, or a rate out of range.

    Source: as :func:`deform_gqa.ops.key_driven_allocation`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, num_kv_heads, attn_drop, proj_drop)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return key_driven_gqa(q, k, v, dropout=self.dropout_p)


@MODELS.register_module()
class GQAAttention(nn.Module):
    """Attention of tokens within groups of similar queries.

    Args:
        embed_dim: Channels C.
        num_heads: Query heads Hq; divides ``embed_dim``.
        num_groups: Number of groups; at most as many as there are tokens are made.
        dropout: Dropout of the attention weights in training, in [0, 1).
        num_kv_heads: Key/value heads that divide ``num_heads``; None for ``num_heads``.
        group_strategy: From queries (B, N, Hq, D) to group ids (B, N), -1 for none;
            None for :func:`deform_gqa.ops.group_queries`.
        attention_function: From (q, k, v, group_ids), q (B, N, Hq, D) and k, v (B, N,
            Hkv, D), to (B, N, Hq, D); None for :func:`deform_gqa.ops.group_attention`.
            A function of one's own sees no dropout.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts that do not divide, or a rate out of range.

    Source: the tutorial's ``GQAAttention``, which cannot run.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_groups: int = 16,
        dropout: float = 0.1,
        num_kv_heads: int | None = None,
        group_strategy: Callable[[Tensor], Tensor] | None = None,
        attention_function: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        num_kv_heads = resolve_kv_heads(embed_dim, num_heads, num_kv_heads)
        check_int('num_groups', num_groups, 1)
        check_rate('dropout', dropout)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.num_groups = num_groups
        self.dropout = dropout
        self.group_strategy = group_strategy
        self.attention_function = attention_function
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, self.head_dim * num_kv_heads)
        self.v_proj = nn.Linear(embed_dim, self.head_dim * num_kv_heads)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend within groups, which keys and values share with the queries.

        Args:
            q: (B, N, C).
            k: (B, N, C).
            v: (B, N, C).
            key_padding_mask: (B, N) boolean, True for padding: it is in no group, so
                that nothing attends to it and its outputs are all the same.

        Returns:
            (B, N, C).

        Raises:
            TypeError: For a tensor of the wrong dtype.
            ValueError: For shapes that do not fit.
        """
        for name, x in (('q', q), ('k', k), ('v', v)):
            checks.check_tensor(name, x, 'B N C')
            expected = (*q.shape[:2], self.embed_dim)
            checks.check_shape(name, x, expected, '(B, N, embed_dim)')
        keep = None if key_padding_mask is None else _not(key_padding_mask, q)
        q, k, v = (
            proj(x).unflatten(2, (-1, self.head_dim))
            for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        strategy = functools.partial(self._groups_of, keep=keep)
        attention = self.attention_function
        if attention is None:
            dropout = self.dropout if self.training else 0.0
            attention = functools.partial(group_attention, dropout=dropout)
        out = custom_gqa(q, k, v, strategy, attention)
        return self.out_proj(out.flatten(2))

    def _groups_of(self, q: Tensor, keep: Tensor | None) -> Tensor:
        if self.group_strategy is None:
            groups = min(self.num_groups, max(q.shape[1], 1))
            return group_queries(q, groups, mask=keep)
        ids = self.group_strategy(q)
        return ids if keep is None else ids.masked_fill(~keep, -1)


@MODELS.register_module()
class GQATransformerEncoder(nn.Module):
    """An encoder, followed by attention within groups of similar tokens.

    Its attention mask goes to both. A residual sum keeps what the encoder found, so
    that a pretrained one can be fine-tuned.

    Args:
        encoder: Called as ``encoder(inputs, attention_mask=attention_mask)``. It
            returns (B, N, C), or a tuple or an object of the transformers package with
            that in the first place.
        embed_dim: C.
        num_heads: As in :class:`GQAAttention`.
        num_groups: As in :class:`GQAAttention`.
        options: Further options of :class:`GQAAttention`.

    Raises:
        TypeError: If ``encoder`` is no module, or for an option of the wrong type.
        ValueError: As :class:`GQAAttention`.

    Source: the tutorial's ``GQATransformerEncoder``.
    """

    def __init__(
        self,
        encoder: nn.Module | dict,
        embed_dim: int,
        num_heads: int,
        num_groups: int,
        **options,
    ):
        super().__init__()
        if isinstance(encoder, dict):
            encoder = MODELS.build(encoder)
        if not isinstance(encoder, nn.Module):
            raise TypeError(f'encoder must be an nn.Module, got {describe(encoder)}')
        self.encoder = encoder
        self.gqa_attn = GQAAttention(embed_dim, num_heads, num_groups, **options)

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            inputs: What the encoder takes, such as token ids (B, N).
            attention_mask: (B, N), 1 or True for tokens, 0 or False for padding.

        Returns:
            (B, N, C).

        Raises:
            ValueError: For a mask of another shape.
        """
        encoded = self.encoder(inputs, attention_mask=attention_mask)
        tokens = encoded if isinstance(encoded, Tensor) else encoded[0]
        padding = None if attention_mask is None else attention_mask == 0
        return tokens + self.gqa_attn(tokens, tokens, tokens, padding)


def _not(key_padding_mask: Tensor, q: Tensor) -> Tensor:
    if getattr(key_padding_mask, 'dtype', None) != torch.bool:
        found = getattr(key_padding_mask, 'dtype', type(key_padding_mask).__name__)
        raise TypeError(f'key_padding_mask must be boolean, got {found}')
    checks.check_shape('key_padding_mask', key_padding_mask, q.shape[:2], '(B, N)')
    return ~key_padding_mask
