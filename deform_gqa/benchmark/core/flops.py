"""FLOPs of a call, counted while it runs: the same number whatever the backend.

Two for each multiply-add of convolutions, linear layers and attention products
(q k^T and the weights times v), by the formulas of ``torch.utils.flop_counter`` and
those that ``flops.py`` in the folder of an op adds to them. Norms, activations,
softmax, position biases and bilinear sampling are left out. Backward counts the
gradients of these products, twice the forward ones; what a fused backward recomputes
is left out, as it is a choice of the implementation. What activation checkpointing
recomputes is counted, as it runs.

``mmengine.analysis`` traces with torch.jit, which takes no training step and no
detector whose control flow depends on the data: hence a dispatcher mode.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from deform_gqa.ops.common.backends import OPS
from deform_gqa.ops.common.flops import attention_backward_flops, attention_flops

aten = torch.ops.aten
_SDPA_KERNELS = (
    'flash_attention_for_cpu',
    'flash_attention',
    'efficient_attention',
    'cudnn_attention',
)


def _convolution_backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *args: Any, **_: Any
) -> int:
    """Torch's own formula takes no note of groups."""
    transposed, (for_x, for_weight, _bias) = args[4], args[7]
    image = x if transposed else grad_out
    pixels = image.shape[0] * math.prod(image.shape[2:])
    return 2 * weight.numel() * pixels * (for_x + for_weight)


def _attention(q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> int:
    return attention_flops(q.shape, q.shape[:-1].numel() * k.shape[-2])


def _attention_backward(_grad, q: torch.Tensor, k: torch.Tensor, *_: Any, **__) -> int:
    """Torch's own formulas count what is recomputed too."""
    return attention_backward_flops(q.shape, q.shape[:-1].numel() * k.shape[-2])


@functools.cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """Torch's, ours, and those where torch's do not say the same."""
    for modules in OPS.values():
        name = f'deform_gqa.ops.{modules.folder}.flops'
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    formulas = dict(flop_registry)
    formulas[aten.convolution_backward] = _convolution_backward
    for kernel in _SDPA_KERNELS:
        name = f'_scaled_dot_product_{kernel}'
        formulas[getattr(aten, name)] = _attention
        formulas[getattr(aten, f'{name}_backward')] = _attention_backward
    return formulas


class _Counter(TorchDispatchMode):
    """Adds up the formulas of all calls that reach the dispatcher.

    Not torch's FlopCounterMode itself: that one follows modules with gradient hooks,
    and fails where a parameter is the input of a module without gradients.
    """

    def __init__(self, compute: bool) -> None:
        super().__init__()
        self.compute = compute
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = _formulas().get(func._overloadpacket)
        if formula is None:
            return func(*args, **kwargs)
        out = (func if self.compute else _zeros(func))(*args, **kwargs)
        self.total += formula(*args, **kwargs, out_val=out)
        return out


def _zeros(func: Callable[..., Any]) -> Callable[..., Any]:
    """An op that returns zeros in the shapes of its outputs."""

    def call(*args: Any, **kwargs: Any) -> Any:
        device = next(
            x for x in tree_leaves(args) if isinstance(x, torch.Tensor)
        ).device
        args, kwargs = tree_map_only(torch.Tensor, _to_meta, (args, kwargs))
        zeros = functools.partial(torch.zeros_like, device=device)
        return tree_map_only(torch.Tensor, zeros, func(*args, **kwargs))

    return call


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to('meta')


def count_flops(call: Callable[[], Any], compute: bool = True) -> int:
    """FLOPs of one call, which runs once.

    Args:
        call: Without arguments.
        compute: False for zeros in place of all that is counted, which saves most of
            the time where the result is not needed.
    """
    # torch's fast path of attention in eval mode is one op, without a formula.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _Counter(compute) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.total
