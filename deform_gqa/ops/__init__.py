"""Functional ops. Needs torch alone; no mm package, and Triton only where it runs."""

from .backends import unsupported_reason
from .functional import deform_attn, deform_sample, neighborhood_attn
from .functional_sdpa import deform_sdpa
from .gqa import scaled_dot_product_gqa

__all__ = [
    'deform_attn',
    'deform_sample',
    'deform_sdpa',
    'neighborhood_attn',
    'scaled_dot_product_gqa',
    'unsupported_reason',
]
