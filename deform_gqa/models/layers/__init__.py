"""Attention modules and the parts of a DAT block; attention is registered in MODELS."""

from .deformable_gqa import DeformableGQA
from .depthwise import DepthwiseConv
from .grouped_multihead_attention import GroupedMultiheadAttention
from .grouped_window_msa import GroupedWindowMSA
from .mlp import MLP, ConvMLP
from .ms_deform_attn import MSDeformAttn
from .multihead_gqa import MultiheadGQA
from .neighborhood_attention import NeighborhoodAttention
from .norm import ChannelLayerNorm
from .pyramid_attention import PyramidAttention
from .window_attention import ShiftedWindowAttention, WindowAttention

__all__ = [
    'MLP',
    'ChannelLayerNorm',
    'ConvMLP',
    'DeformableGQA',
    'DepthwiseConv',
    'GroupedMultiheadAttention',
    'GroupedWindowMSA',
    'MSDeformAttn',
    'MultiheadGQA',
    'NeighborhoodAttention',
    'PyramidAttention',
    'ShiftedWindowAttention',
    'WindowAttention',
]
