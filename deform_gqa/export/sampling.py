"""Bilinear sampling by gathers, in the place of torch's ``grid_sample``."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SAMPLINGS = ('gather', 'grid_sample')


class GatherSampling(TorchFunctionMode):
    """Within it, ``F.grid_sample`` computes the same by gathers.

    The graphs that torch traces then hold no GridSample, which TensorRT compiles to
    wrong results without a word (NVIDIA/TensorRT 4646 and 4813).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        function = sample_by_gather if func is F.grid_sample else func
        return function(*args, **(kwargs or {}))


def sample_by_gather(
    x: Tensor,
    grid: Tensor,
    mode: str = 'bilinear',
    padding_mode: str = 'zeros',
    align_corners: bool | None = None,
) -> Tensor:
    """``F.grid_sample`` of a map, bilinear and with zeros outside.

    Args:
        x: (B, C, H, W), floating.
        grid: (B, h, w, 2) in (x, y), where [-1, 1] spans the map.
        mode: 'bilinear'.
        padding_mode: 'zeros'.
        align_corners: Whether -1 and 1 are the centres of the outer pixels, or the
            edges of the map.

    Returns:
        (B, C, h, w).

    Raises:
        ValueError: For a volume, or another mode.
    """
    if x.ndim != 4 or mode != 'bilinear' or padding_mode != 'zeros':
        raise ValueError(
            "sampling='gather' stands for bilinear sampling of maps with "
            f"padding_mode='zeros', got {x.ndim - 2} dimensions, mode={mode!r}, "
            f'padding_mode={padding_mode!r}'
        )
    height, width = x.shape[2:]
    col, right = _pixel_and_fraction(grid[..., 0].flatten(1), width, align_corners)
    row, down = _pixel_and_fraction(grid[..., 1].flatten(1), height, align_corners)
    pixels = x.flatten(2)
    out = None
    for step_y, weight_y in ((0, 1 - down), (1, down)):
        for step_x, weight_x in ((0, 1 - right), (1, right)):
            y, x_ = row + step_y, col + step_x
            inside = (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
            weight = torch.where(inside, weight_y * weight_x, 0.0)
            index = y.clamp(0, height - 1) * width + x_.clamp(0, width - 1)
            index = index.long().unsqueeze(1).expand(-1, pixels.shape[1], -1)
            term = pixels.gather(2, index) * weight.unsqueeze(1)
            out = term if out is None else out + term
    return out.unflatten(2, grid.shape[1:3])


def _pixel_and_fraction(
    at: Tensor, size: int, align_corners: bool | None
) -> tuple[Tensor, Tensor]:
    """The pixel before each position, as a float, and the way to the next in [0, 1)."""
    at = (at + 1) * ((size - 1) / 2) if align_corners else ((at + 1) * size - 1) / 2
    pixel = at.floor()
    return pixel, at - pixel
