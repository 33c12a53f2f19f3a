"""Exact torch implementations with bounded memory: any device, fast on CPUs.

Queries are worked on in tiles, whose weights are recomputed in backward, so that no
tensor of size N x S x heads ever exists.
"""

from .deform_attn import deform_attn_backward, deform_attn_forward
from .deform_sample import deform_sample
from .deform_sdpa import deform_sdpa_backward, deform_sdpa_forward
from .neighborhood_attn import neighborhood_attn_backward, neighborhood_attn_forward

__all__ = [
    'deform_attn_backward',
    'deform_attn_forward',
    'deform_sample',
    'deform_sdpa_backward',
    'deform_sdpa_forward',
    'neighborhood_attn_backward',
    'neighborhood_attn_forward',
]
