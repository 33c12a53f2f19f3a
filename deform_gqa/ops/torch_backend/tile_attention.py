"""Attention of one tile of queries to all of its keys, forward and backward.

Logits are laid out keys first: (X, S, n) with X any leading batch and n the queries
of the tile. So the interpolated bias, which comes out one key at a time, is their
initial value, and softmax reduces over rows.
"""

import torch
from torch import Tensor


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
    """q (X, n, D), k and v (X, S, D), bias (X, S, n), which is overwritten.

    Returns:
        out (X, n, D) and lse (X, n).
    """
    weights = bias.baddbmm_(k, q.transpose(1, 2), alpha=scale)
    peak = weights.amax(1, keepdim=True)
    # A query that sees no key at all has a peak of -inf; do not make it nan here.
    weights.sub_(peak).exp_()
    total = weights.sum(1, keepdim=True)
    if drop is not None:
        weights.mul_(drop)
    out = torch.bmm(weights.transpose(1, 2), v).div_(total.transpose(1, 2))
    return out, total.log_().add_(peak).squeeze(1)


def attend_tile_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    drop: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and bias; shapes as in :func:`attend_tile`.

    ``bias`` is overwritten.
    """
    weights = bias.baddbmm_(k, q.transpose(1, 2), alpha=scale)
    weights.sub_(lse.unsqueeze(1)).exp_()
    dropped = weights if drop is None else weights * drop
    grad_v = torch.bmm(dropped, grad_out)
    grad_logits = torch.bmm(v, grad_out.transpose(1, 2))
    if drop is not None:
        grad_logits.mul_(drop)
    row_sum = (grad_out * out).sum(-1).unsqueeze(1)
    grad_logits.sub_(row_sum).mul_(weights)
    grad_q = torch.bmm(grad_logits.transpose(1, 2), k).mul_(scale)
    grad_k = torch.bmm(grad_logits, q).mul_(scale)
    return grad_q, grad_k, grad_v, grad_logits
