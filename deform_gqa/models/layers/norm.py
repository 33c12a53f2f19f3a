"""Layer norm over the channels of a map."""

from torch import Tensor, nn


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of each pixel of a (B, C, H, W) map.

    The parameters are ``norm.weight`` and ``norm.bias``, as in the official DAT code
    (``LayerNormProxy``).

    Args:
        dim: Number of channels C.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
