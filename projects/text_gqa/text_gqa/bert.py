"""BERT of Hugging Face transformers with grouped-query attention."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Cache,
)
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertCrossAttention,
    BertSelfAttention,
)

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


class _Grouped:
    """What both attentions of BERT need for fewer key / value heads.

    Args:
        config: Of the model that the layer belongs to.
        kv_heads: Hkv; divides ``config.num_attention_heads``.
        is_causal: Whether queries see earlier tokens alone.
        layer_idx: Place of the layer in a cache.

    Raises:
        TypeError: If ``kv_heads`` is not an integer.
        ValueError: If it does not divide the heads.
    """

    def __init__(
        self,
        config: BertConfig,
        kv_heads: int,
        is_causal: bool = False,
        layer_idx: int | None = None,
    ) -> None:
        check_kv_heads('kv_heads', kv_heads, config.num_attention_heads)
        super().__init__(config, is_causal, layer_idx)
        self.kv_heads = kv_heads
        self.num_key_value_groups = self.num_attention_heads // kv_heads
        kv_dim = kv_heads * self.attention_head_size
        self.key = nn.Linear(config.hidden_size, kv_dim)
        self.value = nn.Linear(config.hidden_size, kv_dim)

    def _attend(
        self,
        hidden_states: Tensor,
        states: Tensor | None,
        mask: Any,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to ``states`` (B, S, C), or to the tokens themselves if None."""
        is_cross = states is not None
        states = states if is_cross else hidden_states
        key, value = keys_and_values(
            lambda: (self._heads(self.key, states), self._heads(self.value, states)),
            cache,
            self.layer_idx,
            is_cross,
        )
        query = self._heads(self.query, hidden_states)
        dropout = self.dropout.p if self.training else 0.0
        options = dict(dropout=dropout, scaling=self.scaling, **kwargs)
        return attend(self, query, key, value, mask, **options)

    def _heads(self, projection: nn.Linear, states: Tensor) -> Tensor:
        return split_heads(projection(states), self.attention_head_size)


class BertGroupedQuerySelfAttention(_Grouped, BertSelfAttention):
    """BERT's self-attention with fewer key / value heads than query heads.

    Query head h reads key / value head h // (Hq / Hkv). ``key`` and ``value`` make Hkv
    heads, and Hkv heads are what a cache receives.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        encoder_hidden_states: None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The call of ``BertSelfAttention``.

        Args:
            hidden_states: (B, L, C).
            attention_mask: As the attention function of the config takes it.
            past_key_values: Cache of this layer's Hkv heads, or None.
            encoder_hidden_states: Without effect; the caller passes it to all.
            kwargs: Passed on to the attention function.

        Returns:
            Output (B, L, C) before the projection, and the weights (B, Hq, L, S) if the
            function is eager.
        """
        return self._attend(
            hidden_states, None, attention_mask, past_key_values, **kwargs
        )


class BertGroupedQueryCrossAttention(_Grouped, BertCrossAttention):
    """BERT's cross-attention with fewer key / value heads than query heads."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The call of ``BertCrossAttention``.

        Args:
            hidden_states: (B, L, C).
            encoder_hidden_states: (B, S, C).
            attention_mask: As the attention function of the config takes it.
            past_key_values: Cache of this layer's Hkv heads, or None.
            kwargs: Passed on to the attention function.

        Returns:
            As self-attention.
        """
        return self._attend(
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            past_key_values,
            **kwargs,
        )


@register_adapter(BertAttention)
class BertAdapter(AttentionAdapter):
    """For :func:`deform_gqa.conversion.convert_model`."""

    def names(self, module: BertAttention) -> Names:
        projections = ('self.query', 'self.key', 'self.value', 'output.dense')
        return Names(*((f'{name}.weight', f'{name}.bias') for name in projections))

    def num_heads(self, module: BertAttention) -> int:
        return module.self.num_attention_heads

    def num_kv_heads(self, module: BertAttention) -> int:
        return module.self.key.out_features // module.self.attention_head_size

    def with_kv_heads(self, module: BertAttention, num_kv_heads: int) -> BertAttention:
        old, is_cross = module.self, module.is_cross_attention
        kind = BertGroupedQuerySelfAttention
        if is_cross:
            kind = BertGroupedQueryCrossAttention
        options = dict(is_causal=old.is_causal, layer_idx=old.layer_idx)
        with torch.device('meta'):  # the weights are those of the module
            new = BertAttention(old.config, is_cross_attention=is_cross, **options)
            inner = kind(old.config, num_kv_heads, **options)
        num_rows = num_kv_heads * old.attention_head_size
        take_children(inner, old, ('key', 'value'), num_rows)
        new.train(module.training)
        new.self, new.output = inner, module.output
        return new


class GQABertConfig(BertConfig):
    """``BertConfig`` with a number of key / value heads.

    Args:
        num_key_value_heads: Hkv; None for ``num_attention_heads``.
    """

    model_type = 'gqa_bert'

    num_key_value_heads: int | None = None


class GQABertModel(BertModel):
    """``BertModel`` built with grouped-query attention.

    Raises:
        TypeError: If the number of kv heads in the config is not an integer.
        ValueError: If it does not divide the heads.
    """

    config: GQABertConfig

    def __init__(self, config: GQABertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        with_kv_heads(self, _counts(self, _kv_heads(config)))


class GQABertForSequenceClassification(BertForSequenceClassification):
    """``BertForSequenceClassification`` built with grouped-query attention.

    Raises:
        TypeError: If the number of kv heads in the config is not an integer.
        ValueError: If it does not divide the heads.
    """

    config: GQABertConfig

    def __init__(self, config: GQABertConfig) -> None:
        super().__init__(config)
        with_kv_heads(self, _counts(self, _kv_heads(config)))


AutoConfig.register(GQABertConfig.model_type, GQABertConfig)
AutoModel.register(GQABertConfig, GQABertModel)
AutoModelForSequenceClassification.register(
    GQABertConfig, GQABertForSequenceClassification
)


def convert_bert_to_gqa(
    module: nn.Module, kv_heads: int, inplace: bool = False, **options: Any
) -> nn.Module:
    """Replace multi-head by grouped-query attention in a BERT, or in one attention.

    The projections of keys and values, and a decoder's cache, become Hq / Hkv times
    smaller. With as many kv heads as query heads nothing changes. The model keeps its
    class; its config becomes a ``GQABertConfig``, and the classes of this module load
    what its ``save_pretrained`` writes. A model that is grouped already can be grouped
    further.

    Args:
        module: A BERT model, a part of one, or a ``BertAttention``.
        kv_heads: Hkv; divides the heads there are.
        inplace: Change ``module`` instead of a copy.
        options: ``grouping``, ``merge`` and other options of
            :func:`deform_gqa.conversion.convert_model`; default: the mean of
            neighbours, as in the GQA paper.

    Returns:
        The converted copy, or ``module``.

    Raises:
        TypeError: If there is no ``BertAttention``, or ``kv_heads`` is not an integer.
        ValueError: If it does not divide the heads, or for wrong options.

    Source: Ainslie et al., "GQA" (arXiv 2305.13245).
    """
    counts = _counts(module, kv_heads)
    module = convert(module, counts, inplace, **options)
    replace_configs(module, GQABertConfig, num_key_value_heads=kv_heads)
    return module


def _kv_heads(config: GQABertConfig) -> int:
    kv_heads = config.num_key_value_heads
    return config.num_attention_heads if kv_heads is None else kv_heads


def _counts(module: nn.Module, kv_heads: int) -> dict[str, int]:
    """Numbers of kv heads by name of attention."""
    attentions = find_attentions(module, BertAttention)
    for attention in attentions.values():
        heads = find_adapter(attention).num_kv_heads(attention)
        check_kv_heads('kv_heads', kv_heads, heads)
    return dict.fromkeys(attentions, kv_heads)
