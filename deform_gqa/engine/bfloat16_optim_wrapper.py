"""Mixed precision for devices that mmengine's AmpOptimWrapper refuses."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import autocast
from torch import nn

__all__ = ['BFloat16OptimWrapper']


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Runs the forward pass under bfloat16 autocast, on any device.

    bfloat16 has the exponent range of float32, so the gradients need no scaling.
    :class:`mmengine.optim.AmpOptimWrapper` scales them, and does not run without a GPU.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast around the forward pass; no gradient exchange while accumulating."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
