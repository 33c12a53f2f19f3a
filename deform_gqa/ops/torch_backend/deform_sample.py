"""deform_sample: definition in ``ops/functional.py``."""

import torch
from torch import Tensor

from .. import naive


def deform_sample(x: Tensor, pos: Tensor) -> Tensor:
    """Differentiable; deterministic where torch is asked for that."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _by_taps(x, pos)
    return naive.deform_sample(x, pos)


def _by_taps(x: Tensor, pos: Tensor) -> Tensor:
    """Four indexed reads, whose backward has a deterministic CUDA kernel."""
    batch, channels, height, width = x.shape
    groups, num_keys = pos.shape[1:3]
    pixels = x.to(pos.dtype).reshape(batch * groups, channels // groups, height * width)
    pixels = pixels.transpose(1, 2)  # (X, H * W, C / G)
    pos = pos.reshape(batch * groups, num_keys, 2)
    at_y = (pos[..., 0] + 1) * ((height - 1) / 2)
    at_x = (pos[..., 1] + 1) * ((width - 1) / 2)
    pair = torch.arange(batch * groups, device=pos.device)[:, None]
    out = 0
    for tap_y in (at_y.floor(), at_y.floor() + 1):
        for tap_x in (at_x.floor(), at_x.floor() + 1):
            inside = (tap_y >= 0) & (tap_y < height) & (tap_x >= 0) & (tap_x < width)
            weight = (1 - (at_y - tap_y).abs()) * (1 - (at_x - tap_x).abs()) * inside
            flat = (tap_y * width + tap_x).where(inside, 0).long()
            out = out + weight.unsqueeze(-1) * pixels[pair, flat]
    return out.transpose(1, 2).reshape(batch, channels, num_keys).to(x.dtype)
