"""Reference points and initial offsets of attention whose queries have own samples."""

import math

import torch
from torch import Tensor


def ring_offsets(groups: int, points: int) -> Tensor:
    """Initial offsets in pixels: (G, P, 2) in (x, y).

    Each offset group looks in a direction of its own. Point p is at a distance of p
    pixels, so that the first one is at the reference point itself.

    Source: Zhu et al., "Deformable DETR" (arXiv 2010.04159), whose points start at a
    distance of 1.
    """
    angle = torch.arange(groups) * (2 * math.pi / groups)
    direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    return direction[:, None] * torch.arange(points)[None, :, None]


def pixel_centres(size: tuple[int, int], like: Tensor) -> Tensor:
    """(H * W, 2) in (x, y), [0, 1] with align_corners=True; 1/2 where a side is 1."""
    rows, cols = (
        torch.linspace(0, 1, side, dtype=like.dtype, device=like.device)
        if side > 1
        else like.new_full((1,), 0.5)
        for side in size
    )
    y, x = torch.meshgrid(rows, cols, indexing='ij')
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def pixel_steps(size: tuple[int, int], like: Tensor) -> Tensor:
    """(2,) normalised length of one pixel in x and y; 0 where a side is 1."""
    return like.new_tensor([1 / (side - 1) if side > 1 else 0.0 for side in size[::-1]])
