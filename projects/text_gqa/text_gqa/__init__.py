"""Language models with grouped-query attention."""

from .bert import (
    BertGroupedQueryCrossAttention,
    BertGroupedQuerySelfAttention,
    GQABertConfig,
    GQABertForSequenceClassification,
    GQABertModel,
    convert_bert_to_gqa,
)
from .kv_cache import KVCache
from .t5 import (
    GQAT5Config,
    GQAT5ForConditionalGeneration,
    T5GroupedQueryAttention,
    convert_t5_to_gqa,
)
from .transformer import (
    GQATransformer,
    GQATransformerDecoderLayer,
    GQATransformerEncoderLayer,
    GQATransformerLM,
)

__all__ = [
    'BertGroupedQueryCrossAttention',
    'BertGroupedQuerySelfAttention',
    'GQABertConfig',
    'GQABertForSequenceClassification',
    'GQABertModel',
    'GQAT5Config',
    'GQAT5ForConditionalGeneration',
    'GQATransformer',
    'GQATransformerDecoderLayer',
    'GQATransformerEncoderLayer',
    'GQATransformerLM',
    'KVCache',
    'T5GroupedQueryAttention',
    'convert_bert_to_gqa',
    'convert_t5_to_gqa',
]
