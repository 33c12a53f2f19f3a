"""Attention of every query to the keys around it."""

from .api import neighborhood_attn

__all__ = ['neighborhood_attn']
