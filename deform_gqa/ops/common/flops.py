"""FLOPs of attention ops, for torch's flop counter.

Imported by those who count, and not with the ops: ``torch.utils.flop_counter`` imports
triton.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# Products of D multiply-adds for each (query, key, head) pair: q k^T and P v, and then
# their gradients. What backward recomputes is a choice of the implementation.
_FORWARD_PRODUCTS = 2
_BACKWARD_PRODUCTS = 4


def attention_flops(q: Sequence[int], pairs: int) -> int:
    """Two for each multiply-add of the products, by the shape (..., N, D) of q."""
    return 2 * _FORWARD_PRODUCTS * pairs * q[-1]


def attention_backward_flops(q: Sequence[int], pairs: int) -> int:
    """Those of the gradients."""
    return 2 * _BACKWARD_PRODUCTS * pairs * q[-1]


def register_attention_flops(op: str, keys: Callable[..., int]) -> None:
    """Gives torch's flop counter the formulas of an op and of its backward.

    Args:
        op: Its name; registered by ``custom_op.register_attention``.
        keys: From the op's arguments, with shapes for tensors, to the number of keys
            that a query attends to.
    """

    @register_flop_formula(getattr(torch.ops.deform_gqa, op))
    def forward(q: Sequence[int], *args: Any, **_: Any) -> int:
        return attention_flops(q, math.prod(q[:-1]) * keys(q, *args))

    @register_flop_formula(getattr(torch.ops.deform_gqa, f'{op}_backward'))
    def backward(_grad, _out, _lse, q: Sequence[int], *args: Any, **_: Any) -> int:
        return attention_backward_flops(q, math.prod(q[:-1]) * keys(q, *args))
