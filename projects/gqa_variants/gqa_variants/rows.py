"""The rows of the table: what stands in the D blocks of the same backbone."""

from typing import Any

# name -> override of block letter D; all have the kv heads of the config where their
# kind knows kv heads
ROWS: dict[str, dict[str, Any]] = {
    'deformable': dict(),
    'deformable-per-query': dict(type='PerQueryDeformableAttention', num_points=8),
    'neighborhood': dict(type='NeighborhoodAttention', kernel_size=7),
    'window': dict(type='WindowAttention', window_size=7),
    'shifted-window': dict(type='ShiftedWindowAttention', window_size=7),
    'pyramid': dict(type='PyramidAttention', sr_ratio=2),
    'linformer-not-share': dict(type='LinformerAttention', sharing='not-share'),
    'linformer-headwise': dict(type='LinformerAttention', sharing='headwise'),
    'linformer-key-value': dict(type='LinformerAttention', sharing='key-value'),
    'linformer-layerwise': dict(type='LinformerAttention', sharing='layerwise'),
    'single-head': dict(type='SingleHeadAttention'),
    'multi-head': dict(type='MultiHeadAttention'),
    'multi-query': dict(type='MultiQueryAttention'),
    'grouped-query': dict(type='GroupedQueryAttention'),
    'latent': dict(type='MultiHeadLatentAttention'),
    'gqa-similarity': dict(type='SimilarityGQA'),
    'gqa-sparse': dict(type='SparseGQA'),
    'gqa-key-driven': dict(type='KeyDrivenGQA'),
    'convolution': dict(type='DepthwiseConv'),
}
