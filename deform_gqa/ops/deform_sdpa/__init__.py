"""Attention of every query to its own samples of several views."""

from .api import deform_sdpa

__all__ = ['deform_sdpa']
