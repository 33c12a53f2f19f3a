"""The arch zoo has moved to ``deform_gqa.archs``."""

from deform_gqa.archs import ARCH_DEFAULTS, ARCHS, NUM_STAGES, resolve_arch

__all__ = ['ARCHS', 'ARCH_DEFAULTS', 'NUM_STAGES', 'resolve_arch']
