"""Functional ops. Needs torch alone; no mm package, and Triton only where it runs.

Each op is a folder: ``api.py`` (the public function and its checks), ``naive.py`` (the
definition, in plain differentiable torch), ``tiled*.py`` (torch with bounded memory)
and ``triton_*.py`` (fused kernels and their launch).

Notation, the same in every op, kernel and test of this package::

    B batch            Hq query heads     Hkv key/value heads (Hq % Hkv == 0)
    G offset groups    D head dimension   (Hq % G == 0)
    H, W query grid    N = H * W queries, row-major
    S sampled keys     V views            P points per view
    K neighborhood (kernel) size          Th, Tw height and width of a bias table

    query head h reads kv head h // (Hq // Hkv)
    query head h belongs to offset group h // (Hq // G)
"""

from .common.backends import unsupported_reason
from .deform_attn import deform_attn
from .deform_sample import deform_sample
from .deform_sdpa import deform_sdpa, deform_sdpa_triton
from .gqa import (
    custom_gqa,
    dynamic_gqa,
    group_attention,
    group_queries,
    groups_for_length,
    hierarchical_gqa,
    key_driven_allocation,
    key_driven_gqa,
    scaled_dot_product_gqa,
    sparse_gqa,
)
from .ms_deform_attn import ms_deform_attn
from .neighborhood_attn import neighborhood_attn

__all__ = [
    'custom_gqa',
    'deform_attn',
    'deform_sample',
    'deform_sdpa',
    'deform_sdpa_triton',
    'dynamic_gqa',
    'group_attention',
    'group_queries',
    'groups_for_length',
    'hierarchical_gqa',
    'key_driven_allocation',
    'key_driven_gqa',
    'ms_deform_attn',
    'neighborhood_attn',
    'scaled_dot_product_gqa',
    'sparse_gqa',
    'unsupported_reason',
]
