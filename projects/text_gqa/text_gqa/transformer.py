"""Encoder-decoder transformers with grouped-query attention, and a language model.

Arguments and parameters have the names of the package grouped-query-attention-pytorch.
Layers are those of MAGNETO: every sublayer is normalised at its start, and again before
its last projection (but cross-attention is not), and initial weights are scaled by the
depth.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_gqa.checks import check_int
from deform_gqa.models.layers import MultiheadGQA
from deform_gqa.ops.gqa import scaled_dot_product_gqa

from .kv_cache import KVCache
from .xpos import XPOS

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: Mapping[str, Activation] = {'relu': F.relu, 'gelu': F.gelu}


class _Layer(nn.Module):
    """Attention and feed-forward sublayers, each added to its input."""

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        dropout: float,
        activation: str | Activation,
        gamma_init: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_int('dim_feedforward', dim_feedforward, least=1)
        self.activation = _activation(activation)
        self.gamma_init = gamma_init
        self.dropout = nn.Dropout(dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward, device=device, dtype=dtype)
        self.linear2 = nn.Linear(dim_feedforward, d_model, device=device, dtype=dtype)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_normal_(linear.weight, gain=gamma_init)
            nn.init.zeros_(linear.bias)

    def _attend(
        self,
        attention: MultiheadGQA,
        query: Tensor,
        memory: Tensor,
        is_causal: bool,
        cache: KVCache | None,
    ) -> Tensor:
        if cache is None:
            out, _ = attention(query, memory, memory, is_causal=is_causal)
        else:
            out = attend_cached(attention, query, memory, cache)
        return self.dropout(out)

    def _feed_forward(self, x: Tensor, inner_norm: nn.LayerNorm) -> Tensor:
        x = self.dropout(self.activation(self.linear1(x)))
        return self.dropout(self.linear2(inner_norm(x)))


class GQATransformerEncoderLayer(_Layer):
    """Self-attention and a feed-forward network.

    Args:
        d_model: Channels C.
        nhead: Hq; divides ``d_model``.
        kv_heads: Hkv; divides ``nhead``.
        dim_feedforward: Hidden channels of the feed-forward network.
        dropout: Of attention weights, hidden channels and outputs of sublayers.
        activation: 'relu', 'gelu' or a function.
        layer_norm_eps: Epsilon of the norms.
        gamma_init: Gain of the initial weights of values, output projections and
            feed-forward network.
        device: Device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        TypeError: For a number of the wrong type.
        ValueError: For numbers that do not divide each other or are out of range, or an
            unknown activation.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        kv_heads: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = 'relu',
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = dict(device=device, dtype=dtype)
        norm = dict(eps=layer_norm_eps, **factory)
        super().__init__(
            d_model, dim_feedforward, dropout, activation, gamma_init, **factory
        )
        self.norm1 = nn.LayerNorm(d_model, **norm)
        self.self_attn = MultiheadGQA(
            d_model,
            nhead,
            kv_heads,
            dropout,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            **factory,
        )
        self.norm2 = nn.LayerNorm(d_model, **norm)
        self.norm3 = nn.LayerNorm(dim_feedforward, **norm)

    def forward(
        self, src: Tensor, is_causal: bool = False, cache: KVCache | None = None
    ) -> Tensor:
        """src (B, L, C) -> (B, L, C); with a cache, L new tokens, always causal."""
        x = self.norm1(src)
        src = src + self._attend(self.self_attn, x, x, is_causal, cache)
        return src + self._feed_forward(self.norm2(src), self.norm3)


class GQATransformerDecoderLayer(_Layer):
    """Self-attention, cross-attention and a feed-forward network.

    The arguments are those of :class:`GQATransformerEncoderLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        kv_heads: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = 'relu',
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = dict(device=device, dtype=dtype)
        norm = dict(eps=layer_norm_eps, **factory)
        super().__init__(
            d_model, dim_feedforward, dropout, activation, gamma_init, **factory
        )
        attention = dict(
            layer_norm_eps=layer_norm_eps, gamma_init=gamma_init, **factory
        )
        self.norm1 = nn.LayerNorm(d_model, **norm)
        self.self_attn = MultiheadGQA(d_model, nhead, kv_heads, dropout, **attention)
        self.norm2 = nn.LayerNorm(d_model, **norm)
        self.multihead_attn = MultiheadGQA(
            d_model, nhead, kv_heads, dropout, layer_norm=False, **attention
        )
        self.norm3 = nn.LayerNorm(d_model, **norm)
        self.norm4 = nn.LayerNorm(dim_feedforward, **norm)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Decode, attending to ``tgt`` and to ``memory``.

        Args:
            tgt: (B, L, C).
            memory: (B, S, C), output of the encoder.
            tgt_is_causal: Token i attends to tokens 0 to i only.
            memory_is_causal: Token i attends to places 0 to i of the memory only.
            cache: Of the tokens before; then both attentions are causal, and ``tgt``
                and ``memory`` hold the new tokens alone.

        Returns:
            (B, L, C).
        """
        x = self.norm1(tgt)
        tgt = tgt + self._attend(self.self_attn, x, x, tgt_is_causal, cache)
        x = self.norm2(tgt)
        tgt = tgt + self._attend(
            self.multihead_attn, x, memory, memory_is_causal, cache
        )
        return tgt + self._feed_forward(self.norm3(tgt), self.norm4)


class _Stack(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(num_layers))


class GQATransformer(nn.Module):
    """An encoder-decoder whose encoder and decoder read the same sequence.

    Args:
        d_model: Channels C.
        nhead: Hq; divides ``d_model``.
        kv_heads: Hkv; divides ``nhead``.
        num_encoder_layers: N, at least 1.
        num_decoder_layers: M, at least 1. The gain of the initial weights of values,
            output projections and feed-forward networks is sqrt(ln(3 M) ln(2 N) / 3) in
            the encoder and sqrt(ln(3 M)) in the decoder.
        dim_feedforward: Hidden channels of the feed-forward networks.
        dropout: Of attention weights, hidden channels and outputs of sublayers.
        activation: 'relu', 'gelu' or a function.
        layer_norm_eps: Epsilon of the norms.
        device: Device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        TypeError: For a number of the wrong type.
        ValueError: For numbers that do not divide each other or are out of range, or an
            unknown activation.

    Source: Ainslie et al., "GQA" (arXiv 2305.13245); Wang et al., "Foundation
    Transformers" (MAGNETO, arXiv 2210.06423);
    https://github.com/fkodom/grouped-query-attention-pytorch.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        kv_heads: int = 4,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = 'relu',
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int('num_encoder_layers', num_encoder_layers, least=1)
        check_int('num_decoder_layers', num_decoder_layers, least=1)
        options = dict(
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            activation=activation,
            layer_norm_eps=layer_norm_eps,
            device=device,
            dtype=dtype,
        )
        encoder_gamma, decoder_gamma = magneto_gammas(
            num_encoder_layers, num_decoder_layers
        )
        # Each layer draws weights of its own.
        self.encoder = _Stack(
            lambda: GQATransformerEncoderLayer(
                d_model, nhead, kv_heads, gamma_init=encoder_gamma, **options
            ),
            num_encoder_layers,
        )
        self.decoder = _Stack(
            lambda: GQATransformerDecoderLayer(
                d_model, nhead, kv_heads, gamma_init=decoder_gamma, **options
            ),
            num_decoder_layers,
        )

    def forward(
        self, x: Tensor, is_causal: bool = True, cache: KVCache | None = None
    ) -> Tensor:
        """Encode and decode a sequence.

        Args:
            x: (B, L, C).
            is_causal: Output i depends on inputs 0 to i only: encoder and decoder are
                both causal, as is the attention from one to the other.
            cache: Keys and values of the inputs before ``x``; those of ``x`` are added.

        Returns:
            (B, L, C).

        Raises:
            ValueError: For a cache without ``is_causal``.
        """
        if cache is not None and not is_causal:
            raise ValueError('cache needs is_causal=True, got False')
        memory = x
        for layer in self.encoder.layers:
            memory = layer(memory, is_causal, cache)
        for layer in self.decoder.layers:
            x = layer(x, memory, is_causal, is_causal, cache)
        return x


class GQATransformerLM(nn.Module):
    """A language model on :class:`GQATransformer`, with XPOS position embeddings.

    Args:
        num_tokens: Size of the vocabulary.
        d_model: Channels C; even. All other arguments are those of
            :class:`GQATransformer`.

    Raises:
        TypeError: For a number of the wrong type.
        ValueError: For numbers that do not divide each other or are out of range, or an
            unknown activation.
    """

    def __init__(
        self,
        num_tokens: int,
        d_model: int = 512,
        nhead: int = 8,
        kv_heads: int = 4,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = 'relu',
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int('num_tokens', num_tokens, least=1)
        factory = dict(device=device, dtype=dtype)
        self.pos_embedding = XPOS(d_model)
        self.transformer = GQATransformer(
            d_model,
            nhead,
            kv_heads,
            num_encoder_layers,
            num_decoder_layers,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            **factory,
        )
        self.token_embedding = nn.Embedding(num_tokens, d_model, **factory)
        self.norm = nn.LayerNorm(d_model, eps=layer_norm_eps, **factory)
        self.out = nn.Linear(d_model, num_tokens, **factory)
        nn.init.kaiming_normal_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, x: Tensor, is_causal: bool = True, cache: KVCache | None = None
    ) -> Tensor:
        """Logits of the tokens that follow.

        Args:
            x: (B, L) token numbers, int64.
            is_causal: Output i depends on tokens 0 to i only.
            cache: Keys and values of the tokens before ``x``; those of ``x`` are added.

        Returns:
            (B, L, num_tokens).

        Raises:
            ValueError: For a cache without ``is_causal``.
        """
        past = 0 if cache is None else cache.length
        x = self.token_embedding(x)
        x = x + self.pos_embedding(x, past)
        return self.out(self.norm(self.transformer(x, is_causal, cache)))

    @torch.no_grad()
    def generate(self, x: Tensor, max_new_tokens: int) -> Tensor:
        """Continue with the most probable token, again and again.

        Each step computes the new token alone; the cache holds Hkv heads of the others.

        Args:
            x: (B, L) token numbers, int64.
            max_new_tokens: Tokens to add.

        Returns:
            (B, L + max_new_tokens).

        Raises:
            TypeError: If ``max_new_tokens`` is not an integer.
            ValueError: If it is negative.
        """
        check_int('max_new_tokens', max_new_tokens, least=0)
        cache, new = KVCache(), x
        for _ in range(max_new_tokens):
            new = self(new, cache=cache)[:, -1:].argmax(dim=-1)
            x = torch.cat([x, new], dim=1)
        return x


def magneto_gammas(
    num_encoder_layers: int, num_decoder_layers: int
) -> tuple[float, float]:
    """Gains of initial weights in an encoder and its decoder (MAGNETO, figure 2)."""
    decoder = math.log(3 * num_decoder_layers)
    encoder = decoder * math.log(2 * num_encoder_layers) / 3
    return encoder**0.5, decoder**0.5


def attend_cached(
    attention: MultiheadGQA, query: Tensor, memory: Tensor, cache: KVCache
) -> Tensor:
    """Causal attention of new tokens to all tokens so far.

    Args:
        attention: Whose keys and values of earlier tokens the cache holds.
        query: (B, L, C), new tokens.
        memory: (B, L, C), what the keys and values of the new tokens are made of.
        cache: Receives them.

    Returns:
        (B, L, C).
    """
    head_dim = attention.embed_dim // attention.query_heads
    key, value = cache.append(
        attention,
        attention.k_proj(memory).unflatten(-1, (attention.kv_heads, -1)),
        attention.v_proj(memory).unflatten(-1, (attention.kv_heads, -1)),
    )
    query = attention.q_proj(query).unflatten(-1, (attention.kv_heads, -1, head_dim))
    dropout = attention.dropout if attention.training else 0.0
    if query.shape[1] == 1:
        # It sees all keys: the query heads of a group are so many queries of one head.
        query = query[:, 0].transpose(1, 2)
        out, _ = scaled_dot_product_gqa(query, key, value, dropout)
        out = out.transpose(1, 2).flatten(1)[:, None]
    else:
        mask = _later_queries_mask(query.shape[1], key)
        out, _ = scaled_dot_product_gqa(
            query.flatten(2, 3), key, value, dropout, mask=mask
        )
        out = out.flatten(2)
    if attention.norm is not None:
        out = attention.norm(out)
    return attention.out_proj(out)


def _later_queries_mask(num_queries: int, key: Tensor) -> Tensor:
    """(1, L, S), True where the last L of S tokens may attend to."""
    ones = torch.ones(1, num_queries, key.shape[1], dtype=torch.bool, device=key.device)
    return ones.tril(key.shape[1] - num_queries)


def _activation(activation: str | Activation) -> Activation:
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f'activation must be one of {list(ACTIVATIONS)} or a function, got '
            f'{activation!r}'
        )
    return ACTIVATIONS[activation]
