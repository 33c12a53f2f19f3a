"""1 x 1 convolutions of maps with channels last."""

import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution (B, C, H, W) -> (B, C', H, W).

    On a CPU, a map with channels last is multiplied as the matrix that it is in memory:
    of a single image torch would otherwise copy it, forward and backward.

    Args:
        in_channels: C.
        out_channels: C'.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        if x.device.type != 'cpu' or not tokens.is_contiguous():
            return super().forward(x)
        out = F.linear(tokens, self.weight.flatten(1), self.bias)
        return out.permute(0, 3, 1, 2)
