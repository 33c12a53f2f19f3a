"""The published fused kernel of deform_sdpa as a baseline, from a folder of the user.

It is the public repository "Fused Deformable Scaled Dot-Product Multi-Head Attention
(Triton)", whose package ``ops.triton`` holds ``deform_sdpa_triton(q, k, v, coords,
width, height, scale)``. It gives no gradient of the coordinates. No part of it is
here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .case import Baseline, Call, OpCase
from .user_copy import UserCopy

NAME = 'published'
COPY = UserCopy('DEFORM_SDPA_PUBLISHED', 'ops.triton', 'deform_sdpa_triton')
HEAD_DIMS = (16, 32, 64, 128, 256)


def unsupported_reason(
    case: OpCase, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why it cannot compute ``case``, or None."""
    if not COPY.is_available():
        return COPY.missing_reason()
    if device.type != 'cuda':
        return 'the published kernel runs on CUDA only'
    if dtype == torch.bfloat16:
        return 'the published kernel knows no bfloat16'
    if case.num_kv_heads != case.num_heads:
        return 'the published kernel knows no grouped heads'
    if case.head_dim not in HEAD_DIMS:
        return f'the published kernel knows no head dim {case.head_dim}'
    return None


def call(case: OpCase) -> Call:
    """The function from the case's tensors to its output."""
    op = COPY.load()
    height, width = case.grid_size

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        q, k, v = (tensors[name] for name in 'qkv')
        return op(q, k, v, tensors['coords'], width, height, case.head_dim**-0.5)

    return run


BASELINE = Baseline(call, unsupported_reason, COPY.is_available, constants=('coords',))
