"""Reference definition of ms_deform_attn: torch's ``grid_sample`` for each level."""

import torch.nn.functional as F
from torch import Tensor

from .levels import check_levels

OUTSIDE = 2.0  # in units of any map


def ms_deform_attn(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    *,
    logits: bool,
) -> Tensor:
    """See :func:`deform_gqa.ops.ms_deform_attn`."""
    batch, num_keys, value_heads, dim = value.shape
    num_queries, heads = locations.shape[1:3]
    dtype = locations.dtype
    # grid_sample makes numbers out of what is none, and none out of what is too large.
    locations = locations.nan_to_num(nan=OUTSIDE).clamp(-OUTSIDE, OUTSIDE)
    weights = weights.to(dtype)
    if logits:
        weights = weights.flatten(3).softmax(-1).view(weights.shape)
    maps = value.to(dtype).repeat_interleave(heads // value_heads, dim=2)
    # (B, D, M, Q), as grid_sample has it
    out = maps.new_zeros(batch * heads, dim, num_queries)
    for level, (height, width, start) in enumerate(
        check_levels(shapes.tolist(), starts.tolist(), num_keys)
    ):
        pixels = maps[:, start : start + height * width].permute(0, 2, 3, 1)
        pixels = pixels.reshape(batch * heads, dim, height, width)
        # An empty map is as good as one of zeros.
        pixels = F.pad(pixels, (0, width == 0, 0, height == 0))
        sampled = F.grid_sample(
            pixels,
            (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1),
            mode='bilinear',
            padding_mode='zeros',
            align_corners=False,
        )
        # (B * M, 1, Q, P)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
        out = out + (sampled * weight).sum(-1)
    out = out.view(batch, heads * dim, num_queries).transpose(1, 2)
    return out.to(value.dtype).contiguous()
