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

    It works on blocks of query rows and recomputes them in backward, so that the bias
    of the whole map is never in memory.

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
    k, v = (repeat_kv(t, q.shape[1]) for t in (k, v))
    height, width = grid_size
    batch, groups, num_keys, _ = pos.shape
    per_row = batch * groups * width * num_keys * LOG_CPB_HIDDEN
    rows = max(1, MAX_LOG_CPB_HIDDEN // max(per_row, 1))
    grid_y, grid_x = (query_coords(side, pos) for side in grid_size)

    def attend_rows(q_rows: Tensor, y: Tensor, k: Tensor, v: Tensor, pos: Tensor):
        grid = torch.stack(torch.meshgrid(y, grid_x, indexing='ij'), dim=-1)
        shift = 4 * (grid.reshape(1, 1, -1, 1, 2) - pos.unsqueeze(2))
        shift = shift.sign() * (shift.abs() + 1).log2() / math.log2(8)
        bias = mlp(shift.to(mlp[0].weight.dtype))  # (B, G, n, S, Hq / G)
        bias = bias.permute(0, 1, 4, 2, 3).flatten(1, 2).to(q_rows.dtype)
        return F.scaled_dot_product_attention(
            q_rows, k, v, attn_mask=bias, dropout_p=dropout_p
        )

    blocks = []
    for first in range(0, height, rows):
        q_rows = q[:, :, first * width : (first + rows) * width]
        block = (q_rows, grid_y[first : first + rows], k, v, pos)
        if torch.is_grad_enabled():
            blocks.append(checkpoint(attend_rows, *block, use_reentrant=False))
        else:
            blocks.append(attend_rows(*block))
    return torch.cat(blocks, dim=2)
