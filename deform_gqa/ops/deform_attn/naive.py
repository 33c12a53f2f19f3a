"""Reference definition of deform_attn: the official formulation, literally.

The bias of all queries and keys is materialised. Every other backend is tested against
this, and the benchmarks call it "eager". Notation: see ``deform_gqa/ops/__init__.py``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.heads import repeat_kv


def query_coords(size: int, like: Tensor) -> Tensor:
    """Coordinates of a query axis in [-1, 1], align_corners=True; 0 if size is 1."""
    if size == 1:
        return like.new_zeros(1)
    return (
        torch.arange(size, dtype=like.dtype, device=like.device)
        .div_((size - 1) / 2)
        .sub_(1)
    )


def interpolated_bias(
    pos: Tensor, rpb_table: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """Relative position bias of every (query, key) pair.

    Args:
        pos: (B, G, S, 2) in (y, x), [-1, 1] with align_corners=True.
        rpb_table: (Hq, Th, Tw).
        grid_size: (H, W).

    Returns:
        (B, Hq, N, S) in the dtype of ``pos``.
    """
    batch, groups, num_keys, _ = pos.shape
    heads = rpb_table.shape[0]
    height, width = grid_size
    grid_y, grid_x = torch.meshgrid(
        query_coords(height, pos), query_coords(width, pos), indexing='ij'
    )
    query = torch.stack((grid_y, grid_x), dim=-1).reshape(height * width, 1, 2)
    displacement = (query - pos.reshape(batch * groups, 1, num_keys, 2)) / 2
    table = rpb_table.to(pos.dtype).reshape(1, groups, -1, *rpb_table.shape[1:])
    bias = F.grid_sample(
        table.expand(batch, -1, -1, -1, -1).flatten(0, 1),
        displacement[..., (1, 0)],  # (y, x) -> (x, y)
        mode='bilinear',
        padding_mode='zeros',
        align_corners=True,
    )
    return bias.reshape(batch, heads, height * width, num_keys)


def deform_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    rpb_table: Tensor | None,
    *,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> Tensor:
    """See :func:`deform_gqa.ops.deform_attn`."""
    k = repeat_kv(k, q.shape[1])
    v = repeat_kv(v, q.shape[1])
    logits = torch.einsum('bhnd,bhsd->bhns', q, k) * scale
    if rpb_table is not None:
        logits = logits + interpolated_bias(pos, rpb_table, grid_size).to(q.dtype)
    weights = F.dropout(logits.softmax(dim=-1), dropout_p)
    return torch.einsum('bhns,bhsd->bhnd', weights, v)
