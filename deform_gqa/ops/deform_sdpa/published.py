"""deform_sdpa under its published name and with the published order of arguments."""

import torch
from torch import Tensor

from ..common import checks
from .api import deform_sdpa


def deform_sdpa_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    W_IMG: int,
    H_IMG: int,
    sm_scale: float,
) -> Tensor:
    """:func:`deform_sdpa` for code that was written for the published fused kernel.

    Unlike the published function it also runs on CPUs, gives a gradient of the
    coordinates, and takes bfloat16, grouped-query heads, any head dimension, and query
    maps whose number and size are not those of the key maps.

    Args:
        q: (B, Vq, Hq, N, D): Vq query views of N queries each. The published function
            wants Vq = V and N = W_IMG * H_IMG.
        k: (B, V, Hkv, H_IMG * W_IMG, D): V key maps, row-major, so that the pixel in
            row y and column x is y * W_IMG + x.
        v: (B, V, Hkv, H_IMG * W_IMG, D).
        coords: (B, Vq, N, V, P, 2) in (x, y), normalised to [0, 1] with
            align_corners=True; any floating dtype.
        W_IMG: Width of the key maps. It comes before the height.
        H_IMG: Height of the key maps.
        sm_scale: Factor of the logits.

    Returns:
        (B, Vq, Hq, N, D), dtype of q.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes that do not fit.

    Source: the public repository "Fused Deformable Scaled Dot-Product Multi-Head
    Attention (Triton)".
    """
    checks.check_tensor('q', q, 'B Vq Hq N D')
    checks.check_tensor('coords', coords, 'B Vq N V P 2')
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    return deform_sdpa(
        q, k, v, coords.to(wanted), grid_size=(H_IMG, W_IMG), scale=sm_scale
    )
