"""The official position biases of deformable attention."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deform_gqa.ops.common.heads import repeat_kv
from deform_gqa.ops.deform_attn.naive import query_coords

POSITION_BIASES = ('table', 'log_cpb', 'fixed', 'dwc', None)
# (query, key, hidden unit) triples that the MLP of 'log_cpb' works on at a time.
MAX_LOG_CPB_HIDDEN = 2**24
LOG_CPB_HIDDEN = 32


def build_position_bias(
    kind: str | None,
    dim: int,
    num_heads: int,
    offset_groups: int,
    table_size: tuple[int, int] | None,
    key_grid: Callable[[tuple[int, int]], tuple[int, int]],
) -> nn.Parameter | nn.Module | None:
    """``rpe_table`` of the official block: a parameter, a module, or None.

    ``key_grid`` returns the size of the grid of sampled keys for the size of a map.

    Raises:
        ValueError: If ``kind`` is 'table' or 'fixed' and ``table_size`` is None.
    """
    if kind in ('table', 'fixed'):
        if table_size is None:
            raise ValueError(
                f'position_bias={kind!r} needs a table_size (height, width), got None'
            )
        height, width = table_size
        shape = (2 * height - 1, 2 * width - 1)
        if kind == 'fixed':
            shape = (height * width, math.prod(key_grid(table_size)))
        table = nn.Parameter(torch.zeros(num_heads, *shape))
        trunc_normal_(table, std=0.01)
        return table
    if kind == 'log_cpb':
        return nn.Sequential(
            nn.Linear(2, LOG_CPB_HIDDEN),
            nn.ReLU(),
            nn.Linear(LOG_CPB_HIDDEN, num_heads // offset_groups, bias=False),
        )
    if kind == 'dwc':
        return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
    return None


def log_cpb_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    mlp: nn.Module,
    grid_size: tuple[int, int],
    dropout_p: float,
) -> Tensor:
    """Attention with the continuous position bias of Swin V2 (arXiv 2111.09883).

    Args:
        q: (B, Hq, N, D).
        k: (B, Hkv, S, D).
        v: (B, Hkv, S, D).
        pos: (B, G, S, 2) in (y, x).
        mlp: Maps log displacements (..., 2) to biases (..., Hq / G).
        grid_size: (H, W).
        dropout_p: Dropout of the attention weights.

    Returns:
        (B, Hq, N, D).
    """
    axes = (query_coords(side, pos) for side in grid_size)
    query_pos = torch.stack(torch.meshgrid(*axes, indexing='ij'), dim=-1)

    def bias(shift: Tensor) -> Tensor:
        shift = 4 * shift
        shift = shift.sign() * (shift.abs() + 1).log2() / math.log2(8)
        return mlp(shift.to(mlp[0].weight.dtype))

    return attend_with_bias(
        q, k, v, query_pos.flatten(0, 1), pos, bias, LOG_CPB_HIDDEN, dropout_p
    )


def attend_with_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_pos: Tensor,
    pos: Tensor,
    bias: Callable[[Tensor], Tensor],
    hidden: int,
    dropout_p: float,
) -> Tensor:
    """Attention with a bias that is a function of the displacement.

    It works on blocks of queries and recomputes them in backward, so that neither the
    bias of the whole map nor a hidden layer of its network is ever in memory.

    Args:
        q: (B, Hq, N, D).
        k: (B, Hkv, S, D).
        v: (B, Hkv, S, D).
        query_pos: (N, A) positions of the queries on A axes.
        pos: (B, G, S, A) positions of the keys.
        bias: Maps displacements (B, G, n, S, A), query less key, to biases (B, G, n, S,
            Hq / G).
        hidden: Width of the widest layer of ``bias``, which sets the size of a block.
        dropout_p: Dropout of the attention weights.

    Returns:
        (B, Hq, N, D).
    """
    k, v = (repeat_kv(t, q.shape[1]) for t in (k, v))
    batch, groups, num_keys, _ = pos.shape
    per_query = max(batch * groups * num_keys * hidden, 1)
    block_size = max(1, MAX_LOG_CPB_HIDDEN // per_query)

    def attend(q: Tensor, query_pos: Tensor, k: Tensor, v: Tensor, pos: Tensor):
        logits = bias(query_pos[:, None] - pos.unsqueeze(2))  # (B, G, n, S, Hq / G)
        mask = logits.permute(0, 1, 4, 2, 3).flatten(1, 2).to(q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p
        )

    blocks = []
    for first in range(0, q.shape[2], block_size):
        block = slice(first, first + block_size)
        args = (q[:, :, block], query_pos[block], k, v, pos)
        if torch.is_grad_enabled():
            blocks.append(checkpoint(attend, *args, use_reentrant=False))
        else:
            blocks.append(attend(*args))
    return torch.cat(blocks, dim=2)
