"""How much memory the keys and values of a T5 take."""

import torch
from transformers import T5ForConditionalGeneration


@torch.no_grad()
def t5_cache_bytes(
    model: T5ForConditionalGeneration, input_length: int, output_length: int
) -> int:
    """Bytes of the cache of one sequence, measured: the model runs.

    Args:
        model: Multi-head or grouped.
        input_length: Tokens that the encoder reads, which cross-attention caches.
        output_length: Tokens that the decoder has read, which self-attention caches.
    """
    tokens = torch.zeros(1, input_length + output_length, dtype=torch.long)
    inputs, outputs = tokens.to(model.device).split([input_length, output_length], 1)
    cache = model(input_ids=inputs, decoder_input_ids=outputs, use_cache=True)
    cache = cache.past_key_values
    both = (cache.self_attention_cache, cache.cross_attention_cache)
    layers = [layer for part in both for layer in part.layers]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
