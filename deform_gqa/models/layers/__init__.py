"""Attention modules and the parts of a DAT block; attention is registered in MODELS."""

from .deformable_attention import (
    DeformableAttention1D,
    DeformableAttention2D,
    DeformableAttention3D,
)
from .deformable_gqa import DeformableGQA
from .dense_attention import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    SingleHeadAttention,
)
from .depthwise import DepthwiseConv
from .gqa_variants import (
    GQAAttention,
    GQATransformerEncoder,
    KeyDrivenGQA,
    SimilarityGQA,
    SparseGQA,
)
from .grouped_multihead_attention import GroupedMultiheadAttention
from .grouped_window_msa import GroupedWindowMSA
from .latent_attention import MultiHeadLatentAttention
from .linformer import LinformerAttention, Projection, share_projections
from .mlp import MLP, ConvMLP
from .ms_deform_attn import MSDeformAttn
from .multihead_gqa import MultiheadGQA
from .neighborhood_attention import NeighborhoodAttention
from .norm import ChannelLayerNorm
from .per_query_deformable import PerQueryDeformableAttention
from .pyramid_attention import PyramidAttention
from .window_attention import ShiftedWindowAttention, WindowAttention

__all__ = [
    'MLP',
    'ChannelLayerNorm',
    'ConvMLP',
    'DeformableAttention1D',
    'DeformableAttention2D',
    'DeformableAttention3D',
    'DeformableGQA',
    'DepthwiseConv',
    'GQAAttention',
    'GQATransformerEncoder',
    'GroupedMultiheadAttention',
    'GroupedQueryAttention',
    'GroupedWindowMSA',
    'KeyDrivenGQA',
    'LinformerAttention',
    'MSDeformAttn',
    'MultiHeadAttention',
    'MultiHeadLatentAttention',
    'MultiQueryAttention',
    'MultiheadGQA',
    'NeighborhoodAttention',
    'PerQueryDeformableAttention',
    'Projection',
    'PyramidAttention',
    'ShiftedWindowAttention',
    'SimilarityGQA',
    'SingleHeadAttention',
    'SparseGQA',
    'WindowAttention',
    'share_projections',
]
