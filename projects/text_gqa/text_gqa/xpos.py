"""XPOS position embedding."""

import torch
from torch import Tensor, nn

from deform_gqa.checks import check_int

BASE = 10000  # longest wavelength over 2 pi, in tokens
SCALE_BASE = 512  # tokens
GAMMA = 0.4


class XPOS(nn.Module):
    """Rotates pairs of channels by the position, and lets them fade.

    Pair i of token n is turned by n / BASE ** (2 i / C) and multiplied by
    zeta_i ** (n / SCALE_BASE), zeta_i = (2 i / C + GAMMA) / (1 + GAMMA). Positions
    count from the first token. The published layer counts the powers from the middle of
    the sequence: there a token's embedding depends on how many tokens follow, so that
    nothing can be decoded step by step.

    Args:
        d_model: Channels C, even.

    Raises:
        TypeError: If ``d_model`` is not an integer.
        ValueError: If it is odd or not positive.

    Source: Sun et al., "A Length-Extrapolatable Transformer" (arXiv 2212.10554);
    https://github.com/microsoft/torchscale.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        check_int('d_model', d_model, least=2)
        if d_model % 2:
            raise ValueError(f'd_model must be even, got {d_model}')
        self.d_model = d_model

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """x (B, L, C) of positions from ``offset`` on -> (B, L, C), dtype of x."""
        positions = torch.arange(offset, offset + x.shape[1], device=x.device)
        positions = positions[:, None].float()
        pair = torch.arange(0, self.d_model, 2, device=x.device) / self.d_model
        angle = positions / BASE**pair
        fade = ((pair + GAMMA) / (1 + GAMMA)) ** (positions / SCALE_BASE)
        cos, sin = (angle.cos() * fade).to(x.dtype), (angle.sin() * fade).to(x.dtype)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(turned, dim=-1).flatten(-2)
