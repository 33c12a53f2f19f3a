"""Formulas by which mmengine's analysis counts the FLOPs of the fused ops.

``tools/analysis_tools/get_flops.py`` of MMDetection and everything else that calls
``mmengine.analysis.get_model_complexity_info`` trace a model with torch.jit. An
operator that mmengine has no handle for counts nothing there.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape

from deform_gqa.ops.common.backends import OPS

__all__ = ['register_flop_handles']


def _argument(value: Any) -> Any:
    """Of a traced operator: the shape of a tensor, else the value itself."""
    return value.toIValue() if get_shape(value) is None else get_shape(value)


def _multiply_adds(op: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """By the formula that torch's flop counter has; mmengine counts a pair as one."""
    # It imports triton, hence not before somebody counts.
    from torch.utils.flop_counter import flop_registry

    importlib.import_module(f'deform_gqa.ops.{OPS[op].folder}.flops')
    formula = flop_registry[getattr(torch.ops.deform_gqa, op)]
    return formula(*map(_argument, inputs), out_val=None) // 2


def _torch_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Of torch's own attention, (..., N, D) queries and (..., S, D) keys."""
    q, k, v = map(get_shape, inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def register_flop_handles() -> None:
    """Adds torch's attention, and the ops that have a formula, to those it knows."""
    handles = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    activations = complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS
    handles.setdefault('aten::scaled_dot_product_attention', _torch_attention)
    for op, modules in OPS.items():
        if importlib.util.find_spec(f'deform_gqa.ops.{modules.folder}.flops'):
            handles[f'deform_gqa::{op}'] = functools.partial(_multiply_adds, op)
            activations[f'deform_gqa::{op}'] = generic_activation_jit()
