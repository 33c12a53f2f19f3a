"""Reference definition of deform_sample: torch's ``grid_sample``."""

import torch.nn.functional as F
from torch import Tensor


def deform_sample(x: Tensor, pos: Tensor) -> Tensor:
    """See :func:`deform_gqa.ops.deform_sample`."""
    batch, channels, height, width = x.shape
    groups, num_keys = pos.shape[1:3]
    sampled = F.grid_sample(
        x.to(pos.dtype).reshape(batch * groups, channels // groups, height, width),
        pos.flip(-1).reshape(batch * groups, 1, num_keys, 2),
        mode='bilinear',
        padding_mode='zeros',
        align_corners=True,
    )
    sampled = sampled.reshape(batch, channels, num_keys).to(x.dtype)
    return sampled.transpose(1, 2).contiguous().transpose(1, 2)
