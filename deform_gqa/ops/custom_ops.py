"""torch.library custom ops: one per attention op, with fake and autograd.

They take a backend name ('torch' or 'triton') and pass the call on, so that
torch.compile sees one opaque node whatever runs inside. Forward returns (out, lse)
with lse (B, Hq, N) the log-sum-exp of the logits (float32; float64 for float64 q);
backward recomputes the weights from it. Neither is differentiable twice. out and the
gradient of q have the layout of ``layout.py``; all else is contiguous.
"""

import importlib

import torch
from torch import Tensor
from torch.library import custom_op

from .autocast import without_autocast
from .layout import empty_tokens_like


def _run(backend: str, name: str, first: Tensor, *args, **options):
    """Calls ``name`` of the backend's module; Triton is imported on first use.

    Backends choose their own precision: autocast must not reach into them.
    """
    function = getattr(
        importlib.import_module(f'.{backend}_backend', __package__), name
    )
    with without_autocast(first.device):
        return function(first, *args, **options)


def _lse_like(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:3], dtype=dtype)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gradient_like(x: Tensor | None, q: Tensor) -> Tensor:
    """Fake gradient; an absent input has an empty one, as ops return no None."""
    return q.new_empty(0) if x is None else _contiguous_like(x)


def _present(grads: list[Tensor], inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else g for g, x in zip(grads, inputs, strict=True)]


@custom_op('deform_gqa::deform_attn', mutates_args=())
def deform_attn_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    rpb_table: Tensor | None,
    seed: Tensor,
    height: int,
    width: int,
    scale: float,
    dropout_p: float,
    pos_in_range: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _run(
        backend,
        'deform_attn_forward',
        q,
        k,
        v,
        pos,
        rpb_table,
        seed=int(seed),
        grid_size=(height, width),
        scale=scale,
        dropout_p=dropout_p,
        pos_in_range=pos_in_range,
    )


@deform_attn_op.register_fake
def _(q, k, v, pos, rpb_table, *options):
    return empty_tokens_like(q), _lse_like(q)


@custom_op('deform_gqa::deform_attn_backward', mutates_args=())
def deform_attn_backward_op(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    rpb_table: Tensor | None,
    seed: Tensor,
    height: int,
    width: int,
    scale: float,
    dropout_p: float,
    pos_in_range: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _run(
        backend,
        'deform_attn_backward',
        grad_out,
        out,
        lse,
        q,
        k,
        v,
        pos,
        rpb_table,
        seed=int(seed),
        grid_size=(height, width),
        scale=scale,
        dropout_p=dropout_p,
        pos_in_range=pos_in_range,
    )


@deform_attn_backward_op.register_fake
def _(grad_out, out, lse, q, k, v, pos, rpb_table, *options):
    grads = (_gradient_like(x, q) for x in (k, v, pos, rpb_table))
    return empty_tokens_like(q), *grads


def _deform_attn_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(output[1])


def _deform_attn_autograd(ctx, grad_out, _grad_lse):
    *inputs, seed, out, lse = ctx.saved_tensors
    grads = deform_attn_backward_op(grad_out, out, lse, *inputs, seed, *ctx.options)
    return *_present(grads, inputs), None, *[None] * len(ctx.options)


deform_attn_op.register_autograd(
    _deform_attn_autograd, setup_context=_deform_attn_setup
)


# The torch backend of deform_sample is differentiable torch code and needs no op.
@custom_op('deform_gqa::deform_sample', mutates_args=())
def deform_sample_op(x: Tensor, pos: Tensor) -> Tensor:
    return _run('triton', 'deform_sample_forward', x, pos)


@deform_sample_op.register_fake
def _(x, pos):
    return x.new_empty((x.shape[0], x.shape[1], pos.shape[2]))


@custom_op('deform_gqa::deform_sample_backward', mutates_args=())
def deform_sample_backward_op(
    grad_out: Tensor, x: Tensor, pos: Tensor
) -> tuple[Tensor, Tensor]:
    return _run('triton', 'deform_sample_backward', grad_out, x, pos)


@deform_sample_backward_op.register_fake
def _(grad_out, x, pos):
    return torch.empty_like(x), _contiguous_like(pos)


def _deform_sample_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _deform_sample_autograd(ctx, grad_out):
    return deform_sample_backward_op(grad_out, *ctx.saved_tensors)


deform_sample_op.register_autograd(
    _deform_sample_autograd, setup_context=_deform_sample_setup
)


@custom_op('deform_gqa::neighborhood_attn', mutates_args=())
def neighborhood_attn_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    seed: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _run(
        backend,
        'neighborhood_attn_forward',
        q,
        k,
        v,
        rpb,
        seed=int(seed),
        grid_size=(height, width),
        kernel_size=kernel_size,
        dilation=dilation,
        scale=scale,
        dropout_p=dropout_p,
    )


@neighborhood_attn_op.register_fake
def _(q, k, v, rpb, *options):
    return empty_tokens_like(q), _lse_like(q)


@custom_op('deform_gqa::neighborhood_attn_backward', mutates_args=())
def neighborhood_attn_backward_op(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    seed: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(
        backend,
        'neighborhood_attn_backward',
        grad_out,
        out,
        lse,
        q,
        k,
        v,
        rpb,
        seed=int(seed),
        grid_size=(height, width),
        kernel_size=kernel_size,
        dilation=dilation,
        scale=scale,
        dropout_p=dropout_p,
    )


@neighborhood_attn_backward_op.register_fake
def _(grad_out, out, lse, q, k, v, rpb, *options):
    return empty_tokens_like(q), *(_gradient_like(x, q) for x in (k, v, rpb))


def _neighborhood_attn_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _neighborhood_attn_autograd(ctx, grad_out, _grad_lse):
    *inputs, seed, out, lse = ctx.saved_tensors
    grads = neighborhood_attn_backward_op(
        grad_out, out, lse, *inputs, seed, *ctx.options
    )
    return *_present(grads, inputs), None, *[None] * len(ctx.options)


neighborhood_attn_op.register_autograd(
    _neighborhood_attn_autograd, setup_context=_neighborhood_attn_setup
)
