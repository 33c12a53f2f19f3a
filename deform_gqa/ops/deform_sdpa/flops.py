"""FLOPs of deform_sdpa: a query attends to V * P keys, by the shape of coords."""

import math

from ..common.flops import register_attention_flops

# coords: (B, Vq, G, N, V, P, 2)
register_attention_flops(
    'deform_sdpa', lambda q, k, v, coords, *_: math.prod(coords[4:6])
)
