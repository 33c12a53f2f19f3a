"""The kernels of msda-triton as a baseline of ms_deform_attn, from a user's folder.

They are those of the public repository rziga/msda-triton, whose module
``msda_triton.frontend`` holds ``triton_multiscale_deformable_attention(img, img_shapes,
sampling_points, attention_weights, padding_mode, align_corners)``. No part of it is
here. The folder is one that pip has installed it into (with ``--target``), as it reads
the metadata of its installation.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .case import Baseline, Call, OpCase
from .user_copy import UserCopy

NAME = 'msda-triton'
COPY = UserCopy(
    'MSDA_TRITON',
    'msda_triton.frontend',
    'triton_multiscale_deformable_attention',
)


def unsupported_reason(
    case: OpCase, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why it cannot compute ``case``, or None."""
    if not COPY.is_available():
        return COPY.missing_reason()
    if device.type != 'cuda':
        return 'msda-triton runs on CUDA only'
    if dtype == torch.bfloat16:
        return 'msda-triton knows no bfloat16'
    if case.num_kv_heads != case.num_heads:
        return 'msda-triton knows no grouped heads'
    return None


def call(case: OpCase) -> Call:
    """The function from the case's tensors to its output."""
    op = COPY.load()

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        out = op(
            tensors['value'],
            tensors['spatial_shapes'],
            tensors['sampling_locations'],
            tensors['attention_weights'],
            'zeros',
            False,
        )
        return out.flatten(2)

    return run


BASELINE = Baseline(call, unsupported_reason, COPY.is_available)
