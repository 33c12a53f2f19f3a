"""Reference definitions in plain differentiable torch: clarity over speed.

Every other backend is tested against these functions. They are the official
formulations, expression by expression (materialised bias, materialised neighborhoods),
so they are also what the benchmarks call "eager".

Notation, the same in every op, kernel and test of this package::

    B batch            Hq query heads     Hkv key/value heads (Hq % Hkv == 0)
    G offset groups    D head dimension   (Hq % G == 0)
    H, W query grid    N = H * W queries, row-major
    S sampled keys     V views            P points per view
    K neighborhood (kernel) size          Th, Tw height and width of a bias table

    query head h reads kv head h // (Hq // Hkv)
    query head h belongs to offset group h // (Hq // G)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def repeat_kv(x: Tensor, num_heads: int) -> Tensor:
    """(B, Hkv, S, D) -> (B, Hq, S, D): kv head h // (Hq // Hkv) for query head h."""
    if x.shape[1] == num_heads:
        return x
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


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


def deform_sample(x: Tensor, pos: Tensor) -> Tensor:
    """See :func:`deform_gqa.ops.deform_sample`."""
    batch, channels, height, width = x.shape
    groups, num_keys = pos.shape[1:3]
    sampled = F.grid_sample(
        x.to(pos.dtype).reshape(batch * groups, channels // groups, height, width),
        pos.flip(-1).reshape(batch * groups, 1, num_keys, 2),
        mode='bilinear',
        padding_mode='zeros',
        align_corners=True,
    )
    return sampled.reshape(batch, channels, num_keys).to(x.dtype)


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
    batch, heads = q.shape[:2]
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
    return torch.einsum('bhnk,bhnkd->bhnd', weights, v).reshape(
        batch, heads, height * width, -1
    )
