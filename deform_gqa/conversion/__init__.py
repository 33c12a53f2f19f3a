"""Conversion of trained multi-head attention to grouped queries.

``convert_state_dict`` and ``convert_model`` are what most need. ``grouping``,
``merging`` and ``alignment`` work on plain tensors of heads; an adapter, registered by
``register_adapter``, tells how a class of modules holds them.
"""

from . import dat_adapters, mm_adapters  # noqa: F401  (registers them)
from .adapter import AttentionAdapter, Names, find_adapter, register_adapter
from .builder import convert_heads
from .checkpoint import convert_checkpoint
from .convert import convert_model, convert_state_dict
from .grouping import SeparateGrouping
from .heads import AttentionHeads, Freedom, Moments, Projection
from .report import ConversionReport, LayerReport

__all__ = [
    'AttentionAdapter',
    'AttentionHeads',
    'ConversionReport',
    'Freedom',
    'LayerReport',
    'Moments',
    'Names',
    'Projection',
    'SeparateGrouping',
    'convert_checkpoint',
    'convert_heads',
    'convert_model',
    'convert_state_dict',
    'find_adapter',
    'register_adapter',
]
