"""Order-independent sums: integer atomics give the same bits in any order."""

import torch
from torch import Tensor

# Bits of a sum that stay below the sign, with one to spare.
BITS = 61


def fixed_point_unit(bound: Tensor) -> Tensor:
    """The power of two by which terms may be multiplied before they become int64.

    Args:
        bound: Scalar tensor, at least the largest absolute sum. Stays on its device:
            nothing waits for the GPU.
    """
    exponent = torch.floor(BITS - torch.log2(bound))
    return torch.exp2(exponent.clamp(-100, 100))
