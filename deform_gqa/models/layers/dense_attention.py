"""Attention of every pixel to every other, with one head or many.

These are the map modules of single-head, multi-head, multi-query and grouped-query
attention. Beneath each lies its form for tokens, which cross-attends, takes masks, and
decodes step by step with a cache.
"""

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_int
from deform_gqa.ops.common import checks
from deform_gqa.ops.common.autocast import without_autocast

from .attention_mask import check_mask_dtype
from .base_attention import BaseAttention

Cache = tuple[Tensor, Tensor]


@MODELS.register_module()
class GroupedQueryAttention(BaseAttention):
    """Dense attention with grouped-query heads, (B, C, H, W) -> (B, C, H, W).

    There is no position bias: blocks have their positions from convolutions. The memory
    is linear in the number of pixels, the time is not.

    Args:
        dim: Number of channels C.
        num_heads: Query heads Hq.
        num_kv_heads: Key/value heads Hkv that divide ``num_heads``; None for
            ``num_heads``.
        n_grouped: Another name of ``num_kv_heads``, which it replaces.
        n_query_each_group: Query heads of each kv head; replaces ``num_kv_heads`` too.
            With ``n_grouped``, the product of both stands for ``num_heads``; alone, it
            divides ``num_heads``.
        head_dim: Channels D of one head; None for ``dim // num_heads``.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts below 1 or that do not divide, or a rate out of range.

    Source: Ainslie et al., "GQA" (arXiv 2305.13245).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        n_grouped: int | None = None,
        n_query_each_group: int | None = None,
        head_dim: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        num_heads, num_kv_heads = _grouped_heads(
            num_heads, num_kv_heads, n_grouped, n_query_each_group
        )
        super().__init__(
            dim, num_heads, num_kv_heads, attn_drop, proj_drop, head_dim=head_dim
        )
        self.proj_q = nn.Linear(dim, self.head_dim * num_heads)
        self.proj_k = nn.Linear(dim, self.kv_dim)
        self.proj_v = nn.Linear(dim, self.kv_dim)
        self.proj_out = nn.Linear(self.head_dim * num_heads, dim)

    def forward(self, x: Tensor) -> Tensor:
        out = self.forward_tokens(x.flatten(2).transpose(1, 2))
        return out.transpose(1, 2).unflatten(2, x.shape[2:])

    def forward_tokens(
        self,
        query: Tensor,
        key_value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention of tokens.

        Args:
            query: (B, N, C).
            key_value: (B, S, C); None stands for ``query``.
            attn_mask: Broadcasts to (B, Hq, N, S). Boolean: True where attention is
                allowed; floating: added to the logits.
            is_causal: Query i attends to keys 0 to i only; not beside a mask.

        Returns:
            (B, N, C).

        Raises:
            TypeError: For a mask that is neither boolean nor floating.
            ValueError: For tokens or a mask of another shape, or ``is_causal`` beside a
                mask.
        """
        self._check_tokens('query', query)
        key_value = query if key_value is None else key_value
        self._check_tokens('key_value', key_value)
        if len(key_value) != len(query):
            raise ValueError(
                f'key_value must have the batch size {len(query)} of query, got '
                f'{len(key_value)}'
            )
        if attn_mask is not None:
            self._check_mask(attn_mask, query, key_value)
            attn_mask = torch.atleast_2d(attn_mask)  # as torch's attention takes it
        if is_causal and attn_mask is not None:
            raise ValueError('attn_mask must be None with is_causal=True, got both')
        k, v = self._keys(key_value)
        return self._attend(query, k, v, attn_mask, is_causal)

    def decode(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """The next tokens of a sequence, which attend to the past and themselves.

        The outputs of all steps together are those of ``forward_tokens`` with
        ``is_causal=True``.

        Args:
            x: (B, n, C), n >= 1.
            cache: What the previous step returned; None at the first.

        Returns:
            Outputs (B, n, C), and the cache: keys and values (B, Hkv, S + n, D).

        Raises:
            ValueError: For tokens of another shape, or a cache of another batch.
        """
        self._check_tokens('x', x)
        past = 0 if cache is None else cache[0].shape[2]
        check_cache(cache, len(x))
        k, v = self._keys(x)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        mask = causal_mask(x.shape[1], past, x.device)
        return self._attend(x, k, v, mask, False), (k, v)

    def _check_tokens(self, name: str, x: Tensor) -> None:
        checks.check_tensor(name, x, 'B N C')
        expected = (*x.shape[:2], self.dim)
        checks.check_shape(name, x, expected, '(B, N, dim)')

    def _check_mask(self, mask: Tensor, query: Tensor, keys: Tensor) -> None:
        check_mask_dtype('attn_mask', mask)
        logits = len(query), self.num_heads, query.shape[1], keys.shape[1]
        sides = zip(reversed(mask.shape), reversed(logits), strict=False)
        if mask.ndim > 4 or any(side not in (1, of) for side, of in sides):
            raise ValueError(
                f'attn_mask must broadcast to (B, Hq, N, S) = {logits}, got '
                f'{tuple(mask.shape)}'
            )

    def _keys(self, x: Tensor) -> Cache:
        """Keys and values (B, Hkv, S, D)."""
        k, v = (
            proj(x).unflatten(2, (self.num_kv_heads, -1)).transpose(1, 2)
            for proj in (self.proj_k, self.proj_v)
        )
        return k, v

    def _attend(self, query, k, v, attn_mask, is_causal) -> Tensor:
        q = self.proj_q(query).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        out = attend_heads(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, dropout_p=self.dropout_p
        )
        return self.proj_drop(self.proj_out(out.transpose(1, 2).flatten(2)))


@MODELS.register_module()
class MultiHeadAttention(GroupedQueryAttention):
    """Dense attention whose heads have keys and values each: Hkv = Hq.

    Args: As in :class:`GroupedQueryAttention`; there are no groups.

    Raises:
        TypeError: As :class:`GroupedQueryAttention`.
        ValueError: As :class:`GroupedQueryAttention`.

    Source: Vaswani et al. (arXiv 1706.03762).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(
            dim, num_heads, head_dim=head_dim, attn_drop=attn_drop, proj_drop=proj_drop
        )


@MODELS.register_module()
class SingleHeadAttention(GroupedQueryAttention):
    """Dense attention with a single head.

    Args:
        dim: Number of channels C.
        num_heads: Not used; part of the interface that all blocks share.
        head_dim: Channels of queries, keys and values; None for ``dim``.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For a ``dim`` or ``head_dim`` below 1, or a rate out of range.

    Source: Vaswani et al. (arXiv 1706.03762).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        head_dim: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(
            dim, 1, head_dim=head_dim, attn_drop=attn_drop, proj_drop=proj_drop
        )


@MODELS.register_module()
class MultiQueryAttention(GroupedQueryAttention):
    """Dense attention whose query heads all read one key/value head.

    Args:
        dim: Number of channels C.
        num_heads: Query heads Hq.
        n_query: Another name of ``num_heads``, which it replaces.
        head_dim: Channels D of one head; None for ``dim // num_heads``.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: As :class:`GroupedQueryAttention`.

    Source: Shazeer, "Fast Transformer Decoding" (arXiv 1911.02150).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_query: int | None = None,
        head_dim: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(
            dim,
            num_heads if n_query is None else n_query,
            1,
            head_dim=head_dim,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )


def attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """torch's fused attention, also where values are narrower than keys.

    Args:
        q: (B, Hq, N, D).
        k: (B, Hkv, S, D), with Hq % Hkv == 0.
        v: (B, Hkv, S, Dv), with Dv <= D.
        attn_mask: As in ``F.scaled_dot_product_attention``.
        is_causal: Query i attends to keys 0 to i.
        dropout_p: Dropout of the weights.
        scale: Factor of the logits; None for 1 / sqrt(D).

    Returns:
        (B, Hq, N, Dv).
    """
    width = v.shape[3]
    if width < k.shape[3]:
        # The fused kernels take one width only; the other kernel holds all weights.
        v = F.pad(v, (0, k.shape[3] - width))
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(q.dtype)
    with without_autocast(q.device):
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out[..., :width]


def check_cache(cache: Cache | None, batch: int) -> None:
    """Both tensors of a decoder's cache are of as many sequences as its step.

    Raises:
        ValueError: For another number.
    """
    if cache is not None and any(len(part) != batch for part in cache):
        raise ValueError(
            f'cache must be of {batch} sequences as x, got {[len(x) for x in cache]}'
        )


def causal_mask(length: int, past: int, device: torch.device) -> Tensor | None:
    """(n, S + n): which keys n new tokens see; None where a single one sees all."""
    if length == 1:
        return None
    ones = torch.ones(length, past + length, dtype=torch.bool, device=device)
    return ones.tril_(past)


def _grouped_heads(
    num_heads: int,
    num_kv_heads: int | None,
    n_grouped: int | None,
    n_query_each_group: int | None,
) -> tuple[int, int | None]:
    """Query heads and kv heads, from whichever of the names are given."""
    given = dict(n_grouped=n_grouped, n_query_each_group=n_query_each_group)
    for name, count in given.items():
        if count is not None:
            check_int(name, count, 1)
    if n_grouped is not None and n_query_each_group is not None:
        return n_grouped * n_query_each_group, n_grouped
    if n_grouped is not None:
        return num_heads, n_grouped
    if n_query_each_group is None:
        return num_heads, num_kv_heads
    check_int('num_heads', num_heads, 1)
    if num_heads % n_query_each_group:
        raise ValueError(
            f'num_heads must be a multiple of n_query_each_group, got '
            f'num_heads={num_heads}, n_query_each_group={n_query_each_group}'
        )
    return num_heads, num_heads // n_query_each_group
