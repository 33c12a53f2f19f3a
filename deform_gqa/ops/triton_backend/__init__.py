"""Fused Triton kernels, forward and backward."""

from .deform_attn_bwd import deform_attn_backward
from .deform_attn_fwd import deform_attn_forward
from .deform_sample import deform_sample_backward, deform_sample_forward
from .deform_sdpa_bwd import deform_sdpa_backward
from .deform_sdpa_fwd import deform_sdpa_forward
from .neighborhood_bwd import neighborhood_attn_backward
from .neighborhood_fwd import neighborhood_attn_forward

__all__ = [
    'deform_attn_backward',
    'deform_attn_forward',
    'deform_sample_backward',
    'deform_sample_forward',
    'deform_sdpa_backward',
    'deform_sdpa_forward',
    'neighborhood_attn_backward',
    'neighborhood_attn_forward',
]
