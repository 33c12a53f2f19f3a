"""mmcv's own op as a baseline of ms_deform_attn: what its layer runs on the device.

On a GPU that is its CUDA kernel, on a CPU its formulation in torch.
"""

import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor

from .case import Baseline, Call, OpCase

NAME = 'mmcv'
IM2COL_STEP = 64  # its default


def is_available() -> bool:
    """Whether mmcv is installed with its compiled ops."""
    if importlib.util.find_spec('mmcv') is None:
        return False
    return importlib.util.find_spec('mmcv._ext') is not None


def unsupported_reason(
    case: OpCase, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why it cannot compute ``case``, or None."""
    if not is_available():
        return 'mmcv with its compiled ops is not installed'
    if case.num_kv_heads != case.num_heads:
        return "mmcv's op knows no grouped heads"
    if device.type == 'cuda' and dtype == torch.bfloat16:
        return "mmcv's kernel knows no bfloat16"
    return None


def call(case: OpCase) -> Call:
    """The function from the case's tensors to its output."""
    from mmcv.ops import multi_scale_deform_attn as mmcv

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        value, shapes = tensors['value'], tensors['spatial_shapes']
        locations, weights = (
            tensors[name].to(value.dtype)
            for name in ('sampling_locations', 'attention_weights')
        )
        if value.device.type == 'cpu':
            return mmcv.multi_scale_deformable_attn_pytorch(
                value, shapes, locations, weights
            )
        return mmcv.MultiScaleDeformableAttnFunction.apply(
            value,
            shapes,
            tensors['level_start_index'],
            locations,
            weights,
            IM2COL_STEP,
        )

    return run


BASELINE = Baseline(call, unsupported_reason, is_available)
