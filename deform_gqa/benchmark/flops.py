"""FLOPs of a call, counted while it runs: the same number whatever the backend.

Two for each multiply-add of convolutions, linear layers and attention products
(q k^T and the weights times v), by the formulas of ``torch.utils.flop_counter`` and
ours. Norms, activations, softmax, position biases and bilinear sampling are left out.
Backward counts the gradients of these products, twice the forward ones; what a fused
backward recomputes is left out, as it is a choice of the implementation. What
activation checkpointing recomputes is counted, as it runs.

``mmengine.analysis`` traces with torch.jit, which takes no training step and no
detector whose control flow depends on the data: hence a dispatcher mode.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import deform_gqa.ops  # noqa: F401  defines torch.ops.deform_gqa

Shape = Sequence[int]
Formula = Callable[..., int]
# Multiply-adds of two products, and of their four gradients.
_FORWARD = 2 * 2
_BACKWARD = 2 * 4
_SDPA_KERNELS = (
    'flash_attention_for_cpu',
    'flash_attention',
    'efficient_attention',
    'cudnn_attention',
)
_KERNEL_SIZE = 7  # place of kernel_size among the arguments of neighborhood_attn


def _pair_values(q: Shape, k: Shape) -> int:
    """Values that go into the logits of q (..., N, D) and k (..., S, D)."""
    return math.prod(q) * k[-2]


def _attention(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return _FORWARD * _pair_values(q, k)


def _attention_backward(_grad: Shape, q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return _BACKWARD * _pair_values(q, k)


def _deform_attn_backward(
    _grad: Shape, _out: Shape, _lse: Shape, q: Shape, k: Shape, *_: Any, **__: Any
) -> int:
    return _BACKWARD * _pair_values(q, k)


def _neighborhood(q: Shape, *args: Any, **_: Any) -> int:
    return _FORWARD * math.prod(q) * args[_KERNEL_SIZE - 1] ** 2


def _neighborhood_backward(
    _grad: Shape, _out: Shape, _lse: Shape, q: Shape, *args: Any, **_: Any
) -> int:
    return _BACKWARD * math.prod(q) * args[_KERNEL_SIZE - 1] ** 2


def _keys_per_query(coords: Shape) -> int:
    """V * P of (B, Vq, G, N, V, P, 2)."""
    return math.prod(coords[4:6])


def _deform_sdpa(q: Shape, _k: Shape, _v: Shape, coords: Shape, *_: Any, **__) -> int:
    return _FORWARD * math.prod(q) * _keys_per_query(coords)


def _deform_sdpa_backward(
    _grad: Shape, _out: Shape, _lse: Shape, q: Shape, _k, _v, coords: Shape, *_, **__
) -> int:
    return _BACKWARD * math.prod(q) * _keys_per_query(coords)


def _convolution(
    x: Shape, weight: Shape, *args: Any, out_shape: Shape, **_: Any
) -> int:
    """The weight meets every place of the output; transposed, of the input."""
    transposed = args[4]
    return 2 * math.prod(weight) * _places(x if transposed else out_shape)


def _convolution_backward(
    grad_out: Shape, x: Shape, weight: Shape, *args: Any, **_: Any
) -> int:
    transposed, (for_x, for_weight, _bias) = args[4], args[7]
    places = _places(x if transposed else grad_out)
    return 2 * math.prod(weight) * places * (for_x + for_weight)


def _places(image: Shape) -> int:
    """N * H * W of (N, C, H, W)."""
    return image[0] * math.prod(image[2:])


def _formulas() -> dict[Any, Formula]:
    """Of our ops, and where torch's own formulas do not say the same.

    Those for its fused attention do not know the CPU kernel, and count what backward
    recomputes; those for the gradient of a convolution take no note of groups.
    """
    ours = {
        'deform_attn': (_attention, _deform_attn_backward),
        'neighborhood_attn': (_neighborhood, _neighborhood_backward),
        'deform_sdpa': (_deform_sdpa, _deform_sdpa_backward),
    }
    formulas: dict[Any, Formula] = {
        torch.ops.aten.convolution: _convolution,
        torch.ops.aten.convolution_backward: _convolution_backward,
    }
    for name, pair in ours.items():
        for op, formula in zip((name, f'{name}_backward'), pair, strict=True):
            formulas[getattr(torch.ops.deform_gqa, op)] = formula
    for kind in _SDPA_KERNELS:
        name = f'_scaled_dot_product_{kind}'
        pair = (_attention, _attention_backward)
        for op, formula in zip((name, f'{name}_backward'), pair, strict=True):
            if hasattr(torch.ops.aten, op):  # not every version has every kernel
                formulas[getattr(torch.ops.aten, op)] = formula
    return formulas


class _Counter(TorchDispatchMode):
    """Adds up the formulas of all calls that reach the dispatcher.

    Not torch's FlopCounterMode itself: that one follows modules with gradient hooks,
    and fails where a parameter is the input of a module without gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.formulas = _formulas()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in self.formulas:
            shapes = [_shape(x) for x in args]
            named = {name: _shape(x) for name, x in kwargs.items()}
            out_shape = _shape(out[0] if isinstance(out, (tuple, list)) else out)
            self.total += self.formulas[packet](*shapes, **named, out_shape=out_shape)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, torch.Tensor) else value


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of one call, which runs once."""
    # torch's fast path of attention in eval mode is one op, without a formula.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _Counter() as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.total
