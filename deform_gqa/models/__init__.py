"""Modules and backbones, registered in mmdet's MODELS on import."""

from .backbones import DAT
from .layers import (
    DeformableGQA,
    DepthwiseConv,
    GroupedMultiheadAttention,
    GroupedQueryAttention,
    GroupedWindowMSA,
    LinformerAttention,
    MSDeformAttn,
    MultiHeadAttention,
    MultiheadGQA,
    MultiHeadLatentAttention,
    MultiQueryAttention,
    NeighborhoodAttention,
    PerQueryDeformableAttention,
    Projection,
    PyramidAttention,
    ShiftedWindowAttention,
    SingleHeadAttention,
    WindowAttention,
    share_projections,
)
from .swap_attention import swap_attention

__all__ = [
    'DAT',
    'DeformableGQA',
    'DepthwiseConv',
    'GroupedMultiheadAttention',
    'GroupedQueryAttention',
    'GroupedWindowMSA',
    'LinformerAttention',
    'MSDeformAttn',
    'MultiHeadAttention',
    'MultiHeadLatentAttention',
    'MultiQueryAttention',
    'MultiheadGQA',
    'NeighborhoodAttention',
    'PerQueryDeformableAttention',
    'Projection',
    'PyramidAttention',
    'ShiftedWindowAttention',
    'SingleHeadAttention',
    'WindowAttention',
    'share_projections',
    'swap_attention',
]
