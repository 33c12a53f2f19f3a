"""The torch backend of deform_sample: each sample as an embedding bag."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import naive


def sample_by_bags(x: Tensor, pos: Tensor) -> Tensor:
    """See :func:`deform_gqa.ops.deform_sample`; deterministic where torch asks for it.

    Else ``grid_sample``, which is faster on a GPU.
    """
    if x.is_cuda and not torch.are_deterministic_algorithms_enabled():
        return naive.deform_sample(x, pos)
    return _by_bags(x, pos)


def _by_bags(x: Tensor, pos: Tensor) -> Tensor:
    """Each sample as an embedding bag of its four pixels' vectors.

    Unlike grid_sample it reads a map with channels last as it lies in memory, whole
    vectors at once, and returns its gradient so. It is deterministic everywhere.
    """
    batch, channels, height, width = x.shape
    groups, num_keys = pos.shape[1:3]
    # (B H W G, C / G)
    vectors = x.to(pos.dtype).permute(0, 2, 3, 1)
    vectors = vectors.reshape(-1, channels // groups)
    row, weight_y = _axis_taps(pos[..., 0], height)
    col, weight_x = _axis_taps(pos[..., 1], width)
    image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1, 1)
    group = torch.arange(groups, device=x.device).view(-1, 1, 1, 1)
    # (B, G, S, 2, 2)
    pixel = (image * height + row.unsqueeze(-1)) * width + col.unsqueeze(-2)
    weight = weight_y.unsqueeze(-1) * weight_x.unsqueeze(-2)
    sampled = F.embedding_bag(
        (pixel * groups + group).view(-1, 4),
        vectors,
        mode='sum',
        per_sample_weights=weight.view(-1, 4),
    )
    sampled = sampled.view(batch, groups, num_keys, channels // groups)
    sampled = sampled.transpose(1, 2).reshape(batch, num_keys, channels)
    return sampled.to(x.dtype).transpose(1, 2)


def _axis_taps(pos: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Positions (...) in [-1, 1] -> index and weight (..., 2) of the two pixels.

    Pixels outside the map have weight 0 and index 0.
    """
    at = (pos + 1) * ((size - 1) / 2)
    first = at.detach().floor()
    pixel = torch.stack((first, first + 1), dim=-1)
    weight = torch.stack((first + 1 - at, at - first), dim=-1)
    inside = (pixel >= 0) & (pixel < size)
    return torch.where(inside, pixel, 0.0).long(), torch.where(inside, weight, 0.0)
