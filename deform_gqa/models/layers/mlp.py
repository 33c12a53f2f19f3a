"""The two MLPs of the DAT blocks: (B, C, H, W) -> (B, C, H, W).

Source: ``TransformerMLP`` and ``TransformerMLPWithConv`` of LeapLabTHU/DAT.
"""

from collections import OrderedDict

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, GELU, linear on every pixel.

    Args:
        dim: Number of channels C.
        ratio: Hidden channels are ``ratio * dim``.
        drop: Dropout after each of the two layers, in [0, 1).
    """

    def __init__(self, dim: int, ratio: float = 4, drop: float = 0.0):
        super().__init__()
        hidden = int(dim * ratio)
        self.chunk = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(dim, hidden),
                act=nn.GELU(),
                drop1=nn.Dropout(drop),
                linear2=nn.Linear(hidden, dim),
                drop2=nn.Dropout(drop),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.chunk(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvMLP(nn.Module):
    """MLP with a residual 3x3 depthwise convolution between its layers.

    Args: as in :class:`MLP`.
    """

    def __init__(self, dim: int, ratio: float = 4, drop: float = 0.0):
        super().__init__()
        hidden = int(dim * ratio)
        # Sequentials of one layer keep the official parameter names.
        self.linear1 = nn.Sequential(nn.Conv2d(dim, hidden, 1))
        self.drop1 = nn.Dropout(drop)
        self.dwc = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.linear2 = nn.Sequential(nn.Conv2d(hidden, dim, 1))
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.linear1(x))
        # In place: on a CPU, allocating a large buffer costs more than computing it.
        x = self.act(self.dwc(x).add_(x))
        return self.drop2(self.linear2(x))
