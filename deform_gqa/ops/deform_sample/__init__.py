"""Bilinear samples of a map at given positions."""

from .api import deform_sample

__all__ = ['deform_sample']
