"""Modules and backbones, registered in mmdet's MODELS on import."""

from .backbones import DAT
from .layers import (
    DeformableGQA,
    DepthwiseConv,
    MultiheadGQA,
    NeighborhoodAttention,
    PyramidAttention,
    ShiftedWindowAttention,
    WindowAttention,
)

__all__ = [
    'DAT',
    'DeformableGQA',
    'DepthwiseConv',
    'MultiheadGQA',
    'NeighborhoodAttention',
    'PyramidAttention',
    'ShiftedWindowAttention',
    'WindowAttention',
]
