"""Attention of one tile of queries to all of its keys, forward and backward.

Logits are laid out keys first: (X, S, n) with X any leading batch and n the queries
of the tile. So the interpolated bias, which comes out one key at a time, is their
initial value, and softmax reduces over rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import LN2, LOG2E


def dropout_scale(shape, p: float, seed: int, like: Tensor) -> Tensor | None:
    """0 or 1 / (1 - p) for each weight, the same for the same seed; None if p is 0."""
    if p == 0.0:
        return None
    generator = torch.Generator(device=like.device).manual_seed(seed)
    keep = torch.rand(shape, generator=generator, device=like.device) >= p
    return keep.to(like.dtype).div_(1 - p)


def attend_tile(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, drop: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a tile.

    Args:
        q: (X, n, D).
        k: (X, S, D).
        v: (X, S, D).
        bias: (X, S, n) in units of ln 2, that is times LOG2E; overwritten.
        scale: Factor of q k^T.
        drop: (X, S, n) from :func:`dropout_scale`, or None.

    Returns:
        out (X, n, D) and lse (X, n).
    """
    weights = bias.baddbmm_(k, (q * (scale * LOG2E)).transpose(1, 2))
    peak = weights.amax(1, keepdim=True)
    weights.sub_(peak).exp2_()
    total = weights.sum(1, keepdim=True)
    if drop is not None:
        weights.mul_(drop)
    out = torch.bmm(weights.transpose(1, 2), v).div_(total.transpose(1, 2))
    return out, total.log2_().add_(peak).mul_(LN2).squeeze(1)


def with_lse(q: Tensor, lse: Tensor, scale: float) -> Tensor:
    """(..., D) and (...) -> (..., D + 1): queries for :func:`attend_tile_backward`.

    Their product with keys that :func:`with_ones` made is the logits less lse, in units
    of ln 2: a column more in the product is a pass less over the tile.
    """
    return torch.cat([q * (scale * LOG2E), lse.unsqueeze(-1) * -LOG2E], dim=-1)


def with_row_sums(grad_out: Tensor, out: Tensor) -> Tensor:
    """(..., D) twice -> (..., D + 1): likewise for the softmax gradient's row sums."""
    row_sums = (grad_out * out).sum(-1, keepdim=True)
    return torch.cat([grad_out, row_sums.neg_()], dim=-1)


def with_ones(x: Tensor) -> Tensor:
    """(..., D) -> (..., D + 1): keys or values for :func:`attend_tile_backward`."""
    return F.pad(x, (0, 1), value=1)


def attend_tile_backward(
    q_lse: Tensor,
    grad_out_sums: Tensor,
    k_ones: Tensor,
    v_ones: Tensor,
    bias: Tensor,
    scale: float,
    drop: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and to the bias in natural units.

    Args:
        q_lse: (X, n, D + 1) from :func:`with_lse`.
        grad_out_sums: (X, n, D + 1) from :func:`with_row_sums`.
        k_ones: (X, S, D + 1) from :func:`with_ones`.
        v_ones: (X, S, D + 1) from :func:`with_ones`.
        bias: (X, S, n) in units of ln 2; overwritten.
        scale: Factor of q k^T.
        drop: (X, S, n) from :func:`dropout_scale`, or None.
    """
    q, grad_out = q_lse[..., :-1], grad_out_sums[..., :-1]
    weights = bias.baddbmm_(k_ones, q_lse.transpose(1, 2)).exp2_()
    if drop is None:
        grad_v = torch.bmm(weights, grad_out)
        grad_logits = torch.bmm(v_ones, grad_out_sums.transpose(1, 2))
    else:
        grad_v = torch.bmm(weights * drop, grad_out)
        grad_logits = torch.bmm(v_ones[..., :-1], grad_out.transpose(1, 2))
        grad_logits.mul_(drop).add_(grad_out_sums[..., None, :, -1])
    grad_logits.mul_(weights)
    grad_q = torch.bmm(grad_logits.transpose(1, 2), k_ones[..., :-1]).mul_(scale)
    grad_k = torch.bmm(grad_logits, q).mul_(LN2)  # q holds scale * LOG2E
    return grad_q, grad_k, grad_v, grad_logits
