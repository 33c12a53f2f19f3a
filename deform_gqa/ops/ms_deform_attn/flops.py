"""FLOPs of ms_deform_attn, for torch's flop counter.

Imported by those who count, and not with the op, as the other ops' formulas are.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# Multiply-adds of D numbers for each of the four pixels of a sample: the weighted sum;
# in backward the products with the gradient, and what each adds to a map.
_FORWARD, _BACKWARD = 1, 2


def _flops(value: Sequence[int], locations: Sequence[int], sums: int) -> int:
    return 2 * sums * 4 * math.prod(locations[:-1]) * value[3]


@register_flop_formula(torch.ops.deform_gqa.ms_deform_attn)
def forward(value, _shapes, _starts, locations, *_: Any, **__: Any) -> int:
    return _flops(value, locations, _FORWARD)


@register_flop_formula(torch.ops.deform_gqa.ms_deform_attn_backward)
def backward(_grad, _out, value, _shapes, _starts, locations, *_: Any, **__: Any):
    return _flops(value, locations, _BACKWARD)
