"""torch.library custom ops of deform_sdpa; conventions as in ``custom_ops.py``.

lse has shape (B, Vq, Hq, N). The coordinates always come with offset groups.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from .custom_ops import _contiguous_like, _run


@custom_op('deform_gqa::deform_sdpa', mutates_args=())
def deform_sdpa_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    seed: Tensor,
    height: int,
    width: int,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _run(
        backend,
        'deform_sdpa_forward',
        q,
        k,
        v,
        coords,
        seed=int(seed),
        grid_size=(height, width),
        scale=scale,
        dropout_p=dropout_p,
    )


@deform_sdpa_op.register_fake
def _(q, k, v, coords, *options):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _contiguous_like(q), q.new_empty(q.shape[:4], dtype=dtype)


@custom_op('deform_gqa::deform_sdpa_backward', mutates_args=())
def deform_sdpa_backward_op(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    seed: Tensor,
    height: int,
    width: int,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(
        backend,
        'deform_sdpa_backward',
        grad_out,
        out,
        lse,
        q,
        k,
        v,
        coords,
        seed=int(seed),
        grid_size=(height, width),
        scale=scale,
        dropout_p=dropout_p,
    )


@deform_sdpa_backward_op.register_fake
def _(grad_out, out, lse, q, k, v, coords, *options):
    return tuple(_contiguous_like(x) for x in (q, k, v, coords))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad_out, _grad_lse):
    *inputs, seed, out, lse = ctx.saved_tensors
    grads = deform_sdpa_backward_op(grad_out, out, lse, *inputs, seed, *ctx.options)
    return *grads, None, *[None] * len(ctx.options)


deform_sdpa_op.register_autograd(_autograd, setup_context=_setup)
