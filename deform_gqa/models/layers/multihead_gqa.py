"""Grouped-query attention as a module for token sequences."""

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from deform_gqa.checks import check_int, check_rate
from deform_gqa.ops.common import checks
from deform_gqa.ops.gqa.api import attend_grouped, causal_mask

from .attention_mask import intersect_masks, merge_masks


@MODELS.register_module()
class MultiheadGQA(nn.Module):
    """Multi-head attention with fewer key / value heads than query heads.

    With ``kv_heads == query_heads`` and ``layer_norm=False`` (the default is True) the
    outputs are those of ``nn.MultiheadAttention(batch_first=True)`` with the same
    weights, and masks mean the same. The call differs in four ways: the arguments after
    ``value`` come in another order, so pass them by name; inputs have a batch
    dimension; weights are returned only if asked for, with the heads in the last
    dimension; and a query that may attend to nothing gets zeros from the attention, not
    NaN.

    The parameters have the names and the initialisation of the original, and its
    checkpoints load. The original's limits on the head dimension (a multiple of 8 up to
    128) came from an old flash attention; they do not apply here. Unlike in the
    original, dropout takes effect.

    Args:
        embed_dim: Channels C of query, key, value and output.
        query_heads: Hq; divides ``embed_dim``.
        kv_heads: Hkv; divides ``query_heads``.
        dropout: Dropout of the attention weights in training, in [0, 1).
        bias: Whether the projections have biases.
        layer_norm: Normalise before the output projection (as MAGNETO, arXiv
            2210.06423, does).
        layer_norm_eps: Epsilon of that norm.
        gamma_init: Gain of the initial weights of the value and output projections.
        device: Device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        TypeError: If a number of channels or heads is not an integer, or ``dropout``
            not a number.
        ValueError: For numbers of channels or heads that do not divide each other, or
            a dropout out of range.

    Source: Ainslie et al., "GQA" (arXiv 2305.13245);
    https://github.com/fkodom/grouped-query-attention-pytorch.
    """

    def __init__(
        self,
        embed_dim: int,
        query_heads: int,
        kv_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int('embed_dim', embed_dim)
        check_int('query_heads', query_heads)
        check_int('kv_heads', kv_heads)
        if query_heads < 1 or embed_dim < 1 or embed_dim % query_heads:
            raise ValueError(
                f'embed_dim must be a multiple of query_heads, got '
                f'embed_dim={embed_dim}, query_heads={query_heads}'
            )
        if kv_heads < 1 or query_heads % kv_heads:
            raise ValueError(
                f'query_heads must be a multiple of kv_heads, got '
                f'query_heads={query_heads}, kv_heads={kv_heads}'
            )
        check_rate('dropout', dropout)
        self.embed_dim = embed_dim
        self.query_heads = query_heads
        self.kv_heads = kv_heads
        self.dropout = dropout
        self.gamma_init = gamma_init

        kv_dim = embed_dim // query_heads * kv_heads
        factory = {'device': device, 'dtype': dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias=bias, **factory)
        self.norm = (
            nn.LayerNorm(embed_dim, eps=layer_norm_eps, **factory)
            if layer_norm
            else None
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier normal weights, zero biases."""
        for proj, gain in (
            (self.q_proj, 1.0),
            (self.k_proj, 1.0),
            (self.v_proj, self.gamma_init),
            (self.out_proj, self.gamma_init),
        ):
            nn.init.xavier_normal_(proj.weight, gain=gain)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        average_attn_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to the keys.

        Args:
            query: (B, L, C), any floating dtype.
            key: (B, S, C).
            value: (B, S, C).
            need_weights: Also return the attention weights.
            attn_mask: (L, S) or (B * Hq, L, S). Boolean: True where attention is NOT
                allowed; floating: added to the logits.
            key_padding_mask: (B, S). Boolean: True for keys to ignore; floating: added
                to the logits.
            is_causal: Query i attends to keys 0 to i only, in addition to the masks.
            average_attn_weights: Average the returned weights over the heads.

        Returns:
            Output (B, L, C) and weights (B, L, S, Hq) after dropout, or (B, L, S) if
            averaged, or None.

        Raises:
            TypeError: For a mask that is neither boolean nor floating.
            ValueError: For shapes that do not fit.
        """
        self._check_inputs(query, key, value)
        mask = merge_masks(
            attn_mask,
            key_padding_mask,
            batch=query.shape[0],
            num_heads=self.query_heads,
            length=query.shape[1],
            num_keys=key.shape[1],
        )
        if mask is not None and is_causal:
            causal = causal_mask(query.shape[1], key.shape[1], query.device)
            mask, is_causal = intersect_masks(mask, causal), False
        out, weights = attend_grouped(
            self.q_proj(query).unflatten(-1, (self.query_heads, -1)),
            self.k_proj(key).unflatten(-1, (self.kv_heads, -1)),
            self.v_proj(value).unflatten(-1, (self.kv_heads, -1)),
            attn_mask=mask,
            is_causal=is_causal,
            dropout=self.dropout if self.training else 0.0,
            scale=(self.embed_dim // self.query_heads) ** -0.5,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
        )
        out = out.flatten(2)
        if self.norm is not None:
            out = self.norm(out)
        return self.out_proj(out), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        checks.check_tensor('query', query, 'B L C')
        checks.check_tensor('key', key, 'B S C')
        checks.check_tensor('value', value, 'B S C')
        batch, length, _ = query.shape
        keys = (batch, key.shape[1], self.embed_dim)
        checks.check_shape(
            'query', query, (batch, length, self.embed_dim), '(B, L, embed_dim)'
        )
        checks.check_shape('key', key, keys, '(B, S, embed_dim)')
        checks.check_shape('value', value, keys, '(B, S, embed_dim)')
