"""Attention whose queries have samples of their own, registered in mmdet's MODELS."""

from deform_gqa.models import PerQueryDeformableAttention

from .multiview import MultiViewDeformableAttention

__all__ = ['MultiViewDeformableAttention', 'PerQueryDeformableAttention']
