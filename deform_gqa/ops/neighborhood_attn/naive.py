"""Reference definition of neighborhood_attn: all neighborhoods materialised."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.heads import repeat_kv


def window_start(size: int, kernel_size: int, dilation: int, device=None) -> Tensor:
    """First key index of each query's window along one axis, clamped at the borders.

    A query at i sees the keys i' with i' % dilation == i % dilation only.
    """
    index = torch.arange(size, device=device)
    phase = index % dilation
    within = index // dilation
    length = (size - phase + dilation - 1) // dilation  # keys of this phase
    start = torch.minimum(
        (within - kernel_size // 2).clamp(min=0), length - kernel_size
    )
    return phase + start * dilation


def neighborhood_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    *,
    grid_size: tuple[int, int],
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """See :func:`deform_gqa.ops.neighborhood_attn`."""
    heads = q.shape[1]
    height, width = grid_size
    steps = torch.arange(kernel_size, device=q.device) * dilation
    rows = window_start(height, kernel_size, dilation, q.device)[:, None] + steps
    cols = window_start(width, kernel_size, dilation, q.device)[:, None] + steps
    # (H, 1, K, 1) and (1, W, 1, K): together one K x K window per query
    rows, cols = rows[:, None, :, None], cols[None, :, None, :]

    k, v = (repeat_kv(t, heads).unflatten(2, grid_size) for t in (k, v))
    # (B, Hq, N, K * K, D)
    k, v = (t[:, :, rows, cols].flatten(2, 3).flatten(3, 4) for t in (k, v))
    logits = torch.einsum('bhnd,bhnkd->bhnk', q, k) * scale
    if rpb is not None:
        query_y = torch.arange(height, device=q.device)[:, None, None, None]
        query_x = torch.arange(width, device=q.device)[None, :, None, None]
        offset_y = (rows - query_y) // dilation + kernel_size - 1
        offset_x = (cols - query_x) // dilation + kernel_size - 1
        bias = rpb[:, offset_y, offset_x]  # (Hq, H, W, K, K)
        logits = logits + bias.flatten(1, 2).flatten(2, 3).to(q.dtype)
    weights = F.dropout(logits.softmax(dim=-1), dropout_p)
    return torch.einsum('bhnk,bhnkd->bhnd', weights, v)
