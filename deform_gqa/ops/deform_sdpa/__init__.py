"""Attention of every query to its own samples of several views."""

from .api import deform_sdpa
from .published import deform_sdpa_triton

__all__ = ['deform_sdpa', 'deform_sdpa_triton']
