"""Attention to shared sampled keys with an interpolated position bias (DAT)."""

from .api import deform_attn

__all__ = ['deform_attn']
