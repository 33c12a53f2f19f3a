"""Modules and backbones, registered in mmdet's MODELS on import."""

from .backbones import DAT
from .layers import (
    DeformableGQA,
    DepthwiseConv,
    GroupedMultiheadAttention,
    GroupedWindowMSA,
    MSDeformAttn,
    MultiheadGQA,
    NeighborhoodAttention,
    PyramidAttention,
    ShiftedWindowAttention,
    WindowAttention,
)
from .swap_attention import swap_attention

__all__ = [
    'DAT',
    'DeformableGQA',
    'DepthwiseConv',
    'GroupedMultiheadAttention',
    'GroupedWindowMSA',
    'MSDeformAttn',
    'MultiheadGQA',
    'NeighborhoodAttention',
    'PyramidAttention',
    'ShiftedWindowAttention',
    'WindowAttention',
    'swap_attention',
]
