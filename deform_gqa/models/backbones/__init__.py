"""Backbones, registered in mmdet's MODELS."""

from .dat import DAT

__all__ = ['DAT']
