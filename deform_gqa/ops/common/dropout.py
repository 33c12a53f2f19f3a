"""Seeds of dropout masks, which backward draws a second time."""

import torch
from torch import Tensor


def dropout_seed(dropout_p: float) -> Tensor | None:
    """An int64 scalar from torch's CPU generator; None where nothing is dropped."""
    return None if dropout_p == 0.0 else torch.randint(2**31, (), device='cpu')
