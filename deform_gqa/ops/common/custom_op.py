"""Registration with torch.library: one argument list gives op, fake and autograd.

torch.compile sees one opaque node whatever runs inside. An attention op takes the
backend's name ('torch' or 'triton') last and returns (out, lse), with lse the
log-sum-exp of the logits (float32; float64 for float64 q); its backward recomputes the
weights from lse. Neither is differentiable twice, nor in forward mode. out and the
gradient of q have the layout that the op asks for; all else is contiguous.

Ops are registered with a ``Library`` and not by ``torch.library.custom_op``, whose
wrappers take 80 us of the host's time in a forward and a backward; this takes 20.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from .autocast import without_autocast
from .backends import implementation
from .layout import empty_tokens_like

_LIBRARY = torch.library.Library('deform_gqa', 'DEF')
# Options of every attention op. Without dropout there is no seed: a tensor on the CPU
# would keep CUDA graphs off the op.
_FIRST_OPTIONS = (
    'Tensor? seed, SymInt height, SymInt width, float scale, float dropout_p'
)


def run_backend(op: str, backend: str, direction: str, *args, **options):
    """Calls the backend's function for 'forward' or 'backward'.

    Backends choose their own precision: autocast must not reach into them.
    """
    function = implementation(op, backend, f'{op}_{direction}')
    with without_autocast(args[0].device):
        return function(*args, **options)


def define(name: str, schema: str, function: Callable, fake: Callable) -> OpOverload:
    """The op ``deform_gqa::name`` with its fake implementation."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, 'CompositeExplicitAutograd')
    torch.library.register_fake(f'deform_gqa::{name}', fake, lib=_LIBRARY)
    return getattr(torch.ops.deform_gqa, name).default


class _Once(torch.autograd.Function):
    """Gradients of an op; those of these raise an error that names it.

    ``sources`` are what they were computed from: torch takes a gradient to be zero
    where no path leads.
    """

    @staticmethod
    def forward(ctx, name, grads, *sources):
        ctx.name = name
        return tuple(x if x is None else x.view_as(x) for x in grads)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f'{ctx.name} cannot be differentiated twice')


def _check_no_tangents(name: str, inputs: tuple) -> None:
    """Forward-mode derivatives stop with an error; without it they would be zero."""
    if forward_ad._current_level < 0:  # as in most calls: looking takes 20 us
        return
    for x in inputs:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f'{name} has no forward-mode derivative')


def register_autograd(op: OpOverload, backward: Callable, save: Callable) -> None:
    """Makes ``op`` differentiable, once.

    Args:
        op: Made by :func:`define`.
        backward: From ctx and the gradients of the outputs to those of the inputs.
        save: Called as ``save(ctx, inputs, outputs)`` in forward.
    """

    def run(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs = run(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            return _Once.apply(op.name(), found, *ctx.saved_tensors, *grads)

    def dispatch(*inputs):
        _check_no_tangents(op.name(), inputs)
        needs_grad = torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs
        )
        return Differentiable.apply(*inputs) if needs_grad else run(*inputs)

    _LIBRARY.impl(op.name().partition('::')[2], dispatch, 'Autograd')


def register_attention(
    name: str,
    tensors: str,
    options: str = '',
    *,
    empty_like: Callable[[Tensor], Tensor] = empty_tokens_like,
) -> OpOverload:
    """Registers an attention op and its backward.

    Args:
        name: Of the op. The functions of its backends are ``{name}_forward(*tensors,
            seed, grid_size, scale, dropout_p, *options)``, all but the tensors by
            name, and ``{name}_backward(grad_out, out, lse, *tensors, ...)``, which
            returns the gradients of all tensors.
        tensors: Names of the tensors, q first; those that end in '?' may be None, and
            their gradient is then an empty tensor, as ops return no None.
        options: Further options with their types in the language of torch's schemas,
            such as ``'SymInt kernel_size, SymInt dilation'``.
        empty_like: Makes the fake out and gradient of q, in the layout that the
            backends give them.

    Returns:
        The op; its arguments are the tensors, a seed (int64 scalar, or None at
        dropout 0), the height and width of the grid, scale, dropout_p, the further
        options, and the backend's name.
    """
    inputs = [_schema_of(tensor) for tensor in tensors.split()]
    count = len(inputs)
    names = [option.split()[1] for option in options.split(', ') if option]
    last = len(names) + 1
    listed = ', '.join(
        [*inputs, _FIRST_OPTIONS, *filter(None, [options]), 'str backend']
    )

    def run(direction: str, args: tuple):
        args, further, backend = args[:-last], args[-last:-1], args[-1]
        *inputs, seed, height, width, scale, dropout_p = args
        return run_backend(
            name,
            backend,
            direction,
            *inputs,
            seed=0 if seed is None else int(seed),
            grid_size=(height, width),
            scale=scale,
            dropout_p=dropout_p,
            **dict(zip(names, further, strict=True)),
        )

    def fake_forward(q: Tensor, *args):
        return empty_like(q), _lse_like(q)

    def fake_backward(grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, *args):
        others = args[: count - 1]
        return empty_like(q), *(_fake_gradient(x, q) for x in others)

    forward = define(
        name,
        f'({listed}) -> (Tensor, Tensor)',
        lambda *args: run('forward', args),
        fake_forward,
    )
    backward = define(
        f'{name}_backward',
        f'(Tensor grad_out, Tensor out, Tensor lse, {listed}) '
        f'-> ({", ".join(["Tensor"] * count)})',
        lambda *args: tuple(run('backward', args)),
        fake_backward,
    )

    def save(ctx, inputs, outputs):
        ctx.save_for_backward(*inputs[: count + 1], *outputs)
        ctx.options = inputs[count + 1 :]
        ctx.mark_non_differentiable(outputs[1])

    def differentiate(ctx, grad_out, _grad_lse):
        *inputs, seed, out, lse = ctx.saved_tensors
        grads = backward(grad_out, out, lse, *inputs, seed, *ctx.options)
        present = (
            None if x is None else grad for x, grad in zip(inputs, grads, strict=True)
        )
        return *present, None, *[None] * len(ctx.options)

    register_autograd(forward, differentiate, save)
    return forward


def contiguous_like(x: Tensor) -> Tensor:
    """Empty, of x's shape, dtype and device, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _schema_of(tensor: str) -> str:
    """'q' -> 'Tensor q', 'pos?' -> 'Tensor? pos'."""
    return f'Tensor? {tensor[:-1]}' if tensor.endswith('?') else f'Tensor {tensor}'


def _lse_like(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:-1], dtype=dtype)


def _fake_gradient(x: Tensor | None, q: Tensor) -> Tensor:
    return q.new_empty(0) if x is None else contiguous_like(x)
