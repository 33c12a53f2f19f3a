"""Memory layout of what the attention ops return."""

import torch
from torch import Tensor


def empty_tokens_like(x: Tensor) -> Tensor:
    """Empty (B, H, N, D) of x's shape, dtype and device, in (B, N, H, D) memory.

    So merging heads into tokens (B, N, H * D), which is what follows an attention and
    what the gradient of its queries flows into, is a view and not a copy.
    """
    batch, heads, tokens, dim = x.shape
    empty = torch.empty((batch, tokens, heads, dim), dtype=x.dtype, device=x.device)
    return empty.transpose(1, 2)
