"""Attention whose queries have samples of their own, registered in mmdet's MODELS."""

from .multiview import MultiViewDeformableAttention
from .per_query import PerQueryDeformableAttention

__all__ = ['MultiViewDeformableAttention', 'PerQueryDeformableAttention']
