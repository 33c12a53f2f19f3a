"""Masks of dense attention, as ``nn.MultiheadAttention`` takes them."""

import torch
from torch import Tensor

from deform_gqa.ops.common import checks


def merge_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    batch: int,
    num_heads: int,
    length: int,
    num_keys: int,
) -> Tensor | None:
    """One mask for both, boolean (True allows) or to be added to the logits.

    Args:
        attn_mask: (L, S) or (B * Hq, L, S). Boolean: True where attention is NOT
            allowed; floating: added to the logits.
        key_padding_mask: (B, S). Boolean: True for keys to ignore; floating: added to
            the logits.
        batch: B.
        num_heads: Hq.
        length: L.
        num_keys: S.

    Returns:
        A mask that broadcasts to (B, Hq, L, S), or None.

    Raises:
        TypeError: For a mask that is neither boolean nor floating.
        ValueError: For a shape that does not fit.
    """
    masks = []
    if attn_mask is not None:
        check_mask_dtype('attn_mask', attn_mask)
        expected = (length, num_keys)
        if attn_mask.ndim != 2:
            expected = (batch * num_heads, *expected)
        checks.check_shape(
            'attn_mask', attn_mask, expected, '(L, S) or (B * query_heads, L, S)'
        )
        if attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (batch, num_heads))
        masks.append(attn_mask)
    if key_padding_mask is not None:
        check_mask_dtype('key_padding_mask', key_padding_mask)
        checks.check_shape(
            'key_padding_mask', key_padding_mask, (batch, num_keys), '(B, S)'
        )
        masks.append(key_padding_mask[:, None, None])
    masks = [~mask if mask.dtype == torch.bool else mask for mask in masks]
    if len(masks) == 2:
        return intersect_masks(*masks)
    return masks[0] if masks else None


def intersect_masks(first: Tensor, second: Tensor) -> Tensor:
    """Both masks at once; each is boolean (True allows) or additive."""
    if first.dtype == second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        first, second = second, first
    if second.dtype == torch.bool:
        return torch.where(second, first, -torch.inf)
    return first + second


def check_mask_dtype(name: str, mask: Tensor) -> None:
    """A boolean or floating tensor."""
    if not isinstance(mask, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(mask).__name__}')
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f'{name} must be boolean or floating, got {mask.dtype}')
