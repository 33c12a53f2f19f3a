"""Deformable attention with grouped queries for MMDetection.

Importing the package is cheap: kernels and models are imported by those who name
``deform_gqa.ops`` or ``deform_gqa.models``.
"""

from deform_gqa.version import __version__

__all__ = ['__version__']
