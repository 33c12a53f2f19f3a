"""T5 of Hugging Face transformers with grouped-query attention."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    Cache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention

from deform_gqa.conversion import (
    AttentionAdapter,
    Names,
    find_adapter,
    register_adapter,
)

from .attention import attend, keys_and_values, split_heads
from .conversion import (
    check_kv_heads,
    convert,
    find_attentions,
    replace_configs,
    take_children,
    with_kv_heads,
)


class T5GroupedQueryAttention(T5Attention):
    """T5's attention with fewer key / value heads than query heads.

    Query head h reads key / value head h // (Hq / Hkv). ``k`` and ``v`` make Hkv heads,
    and Hkv heads are what a cache receives.

    Args:
        config: Of the stack that the layer belongs to.
        kv_heads: Hkv; divides ``config.num_heads``.
        has_relative_attention_bias: Whether the layer has a table of position biases.
        layer_idx: Place of the layer in a cache.
        is_causal: Whether queries see earlier tokens alone.

    Raises:
        TypeError: If ``kv_heads`` is not an integer.
        ValueError: If it does not divide the heads.
    """

    def __init__(
        self,
        config: T5Config,
        kv_heads: int,
        has_relative_attention_bias: bool = False,
        layer_idx: int | None = None,
        is_causal: bool = False,
    ) -> None:
        check_kv_heads('kv_heads', kv_heads, config.num_heads)
        super().__init__(config, has_relative_attention_bias, layer_idx, is_causal)
        self.kv_heads = kv_heads
        self.num_key_value_groups = self.n_heads // kv_heads
        kv_dim = kv_heads * self.key_value_proj_dim
        self.k = nn.Linear(self.d_model, kv_dim, bias=False)
        self.v = nn.Linear(self.d_model, kv_dim, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Any = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The call of ``T5Attention``.

        Args:
            hidden_states: (B, L, C).
            mask: As the attention function of the config takes it.
            key_value_states: (B, S, C) for cross-attention; None for self-attention.
            position_bias: (1, Hq, L, S) from an earlier layer, or None.
            past_key_values: Cache of this layer's Hkv heads, or None.
            kwargs: Passed on to the attention function.

        Returns:
            Output (B, L, C); the position bias for the layers after this one, None in
            cross-attention; the weights (B, Hq, L, S) if the function is eager.
        """
        past = 0
        if past_key_values is not None:
            past = past_key_values.get_seq_length(self.layer_idx)
            if isinstance(past, Tensor):
                past = past.clone()  # a static cache counts on in place
        is_cross = key_value_states is not None
        states = key_value_states if is_cross else hidden_states
        key, value = keys_and_values(
            lambda: (self._heads(self.k, states), self._heads(self.v, states)),
            past_key_values,
            self.layer_idx,
            is_cross,
        )
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.compute_bias(
                hidden_states.shape[1], key.shape[2], past_seen_tokens=past
            )
        out, weights = attend(
            self,
            self._heads(self.q, hidden_states),
            key,
            value,
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=position_bias,
            **kwargs,
        )
        return self.o(out), position_bias, weights

    def _heads(self, projection: nn.Linear, states: Tensor) -> Tensor:
        return split_heads(projection(states), self.key_value_proj_dim)


@register_adapter(T5Attention)
class T5Adapter(AttentionAdapter):
    """For :func:`deform_gqa.conversion.convert_model`."""

    def names(self, module: T5Attention) -> Names:
        return Names(*((f'{name}.weight', None) for name in 'qkvo'))

    def num_heads(self, module: T5Attention) -> int:
        return module.n_heads

    def num_kv_heads(self, module: T5Attention) -> int:
        return module.k.out_features // module.key_value_proj_dim

    def head_period(self, module: T5Attention) -> int:
        """Layers of self-attention share position biases by head: all must stay."""
        is_cross = module.is_decoder and not module.is_causal
        return module.n_heads if is_cross else 1

    def with_kv_heads(
        self, module: T5Attention, num_kv_heads: int
    ) -> T5GroupedQueryAttention:
        with torch.device('meta'):  # the weights are those of the module
            new = T5GroupedQueryAttention(
                module.config,
                num_kv_heads,
                module.has_relative_attention_bias,
                module.layer_idx,
                module.is_causal,
            )
        take_children(new, module, 'kv', num_kv_heads * module.key_value_proj_dim)
        new.gradient_checkpointing = module.gradient_checkpointing
        return new


class GQAT5Config(T5Config):
    """``T5Config`` with numbers of key / value heads.

    Args:
        num_key_value_heads: Hkv of the decoder, self- and cross-attention. None for
            ``num_heads``.
        encoder_num_key_value_heads: Hkv of the encoder. None for that of the decoder.
    """

    model_type = 'gqa_t5'

    num_key_value_heads: int | None = None
    encoder_num_key_value_heads: int | None = None


class GQAT5ForConditionalGeneration(T5ForConditionalGeneration):
    """``T5ForConditionalGeneration`` built with grouped-query attention.

    Loads what a converted model has saved.

    Raises:
        TypeError: If a number of kv heads in the config is not an integer.
        ValueError: If one does not divide the heads.
    """

    config: GQAT5Config

    def __init__(self, config: GQAT5Config) -> None:
        super().__init__(config)
        decoder = config.num_key_value_heads
        decoder = config.num_heads if decoder is None else decoder
        counts = _counts(self, decoder, config.encoder_num_key_value_heads)
        with_kv_heads(self, counts)


AutoConfig.register(GQAT5Config.model_type, GQAT5Config)
AutoModelForSeq2SeqLM.register(GQAT5Config, GQAT5ForConditionalGeneration)


def convert_t5_to_gqa(
    module: nn.Module,
    kv_heads: int,
    inplace: bool = False,
    *,
    encoder_kv_heads: int | None = None,
    **options: Any,
) -> nn.Module:
    """Replace multi-head by grouped-query attention in a T5, or in one attention.

    Weights of ``k`` and ``v``, and the cache, become Hq / Hkv times smaller. With as
    many kv heads as query heads nothing changes. The model keeps its class; its config
    becomes a ``GQAT5Config``, and ``GQAT5ForConditionalGeneration.from_pretrained``
    loads what its ``save_pretrained`` writes. A model that is grouped already can be
    grouped further.

    Args:
        module: A T5 model, a part of one, or a ``T5Attention``.
        kv_heads: Hkv; divides the heads there are.
        inplace: Change ``module`` instead of a copy. A single attention cannot change
            its class: then the result shares weights with it.
        encoder_kv_heads: Hkv of encoders, whose attention the GQA paper leaves alone:
            the number of query heads does that. Default: ``kv_heads``.
        options: ``grouping``, ``merge`` and other options of
            :func:`deform_gqa.conversion.convert_model`; default: the mean of
            neighbours, as in the paper. In self-attention only neighbours can be
            merged, as layers share position biases.

    Returns:
        The converted copy, or ``module``.

    Raises:
        TypeError: If there is no ``T5Attention``, or a number is not an integer.
        ValueError: If a number does not divide the heads, or for wrong options.

    Source: Ainslie et al., "GQA" (arXiv 2305.13245).
    """
    counts = _counts(module, kv_heads, encoder_kv_heads)
    module = convert(module, counts, inplace, **options)
    replace_configs(
        module,
        GQAT5Config,
        num_key_value_heads=kv_heads,
        encoder_num_key_value_heads=encoder_kv_heads,
    )
    return module


def _counts(
    module: nn.Module, kv_heads: int, encoder_kv_heads: int | None
) -> dict[str, int]:
    """Numbers of kv heads by name of attention; see :func:`convert_t5_to_gqa`."""
    counts = {}
    for name, attention in find_attentions(module, T5Attention).items():
        argument, count = 'kv_heads', kv_heads
        if not attention.is_decoder and encoder_kv_heads is not None:
            argument, count = 'encoder_kv_heads', encoder_kv_heads
        check_kv_heads(argument, count, find_adapter(attention).num_kv_heads(attention))
        counts[name] = count
    return counts
