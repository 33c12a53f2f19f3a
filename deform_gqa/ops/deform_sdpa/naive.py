"""Reference definition of deform_sdpa: ``grid_sample``, then softmax attention.

Notation: see ``deform_gqa/ops/__init__.py``. The coordinates are those of
:func:`deform_gqa.ops.deform_sdpa` with their offset groups, (B, Vq, G, N, V, P, 2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_views(maps: Tensor, coords: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Bilinear samples of every view's map, zero outside.

    Args:
        maps: (B, V, Hq, Hk * Wk, D).
        coords: (B, Vq, Hq, N, V, P, 2) in (x, y), [0, 1] with align_corners=True.
        grid_size: (Hk, Wk).

    Returns:
        (B, Vq, Hq, N, V * P, D), dtype of ``maps``; computed in that of ``coords``.
    """
    batch, views, heads, _, head_dim = maps.shape
    query_views, _, num_queries, _, points, _ = coords.shape[1:]
    grid = coords.permute(0, 4, 2, 1, 3, 5, 6)  # (B, V, Hq, Vq, N, P, 2)
    pixels = maps.to(coords.dtype).transpose(-1, -2)  # (B, V, Hq, D, Hk * Wk)
    sampled = F.grid_sample(
        pixels.reshape(batch * views * heads, head_dim, *grid_size),
        grid.reshape(batch * views * heads, query_views * num_queries, points, 2) * 2
        - 1,
        mode='bilinear',
        padding_mode='zeros',
        align_corners=True,
    )
    sampled = sampled.reshape(
        batch, views, heads, head_dim, query_views, num_queries, points
    )
    return sampled.permute(0, 4, 2, 5, 1, 6, 3).flatten(4, 5).to(maps.dtype)


def deform_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    *,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> Tensor:
    """See :func:`deform_gqa.ops.deform_sdpa`."""
    heads = q.shape[2]
    coords = coords.repeat_interleave(heads // coords.shape[2], dim=2)
    k, v = (
        sample_views(x.repeat_interleave(heads // x.shape[2], 2), coords, grid_size)
        for x in (k, v)
    )
    logits = torch.einsum('bwhnd,bwhnsd->bwhns', q, k) * scale
    weights = F.dropout(logits.softmax(dim=-1), dropout_p)
    return torch.einsum('bwhns,bwhnsd->bwhnd', weights, v)
