"""Order-independent sums: integer atomics give the same bits in any order."""

import torch
from torch import Tensor

# Bits of a sum that stay below the sign, with one to spare.
BITS = 61


def fixed_point_unit(bound: Tensor) -> Tensor:
    """The power of two by which terms may be multiplied before they become int64.

    Args:
        bound: Scalar tensor, at least the largest absolute sum. Stays on its device:
            nothing waits for the GPU. Where it is not finite, neither is the unit, and
            sums come back as NaN: int64 holds no other.
    """
    exponent = torch.floor(BITS - torch.log2(bound)).clamp(-100, 100)
    return torch.exp2(exponent) + 0 * bound


def from_fixed_point(sums: Tensor, unit: Tensor, witness: Tensor) -> Tensor:
    """Sums of terms times ``unit`` in float64, NaN if ``witness`` is not finite.

    Args:
        sums: int64.
        unit: Scalar tensor of :func:`fixed_point_unit`.
        witness: Floating, any shape: what an infinite or NaN term reaches as well, as
            it leaves an ordinary number in ``sums``.
    """
    return sums.double() / unit.double() + 0 * witness.double().sum()
