"""Multi-scale deformable attention, as in Deformable DETR and its descendants."""

from .api import ms_deform_attn

__all__ = ['ms_deform_attn']
