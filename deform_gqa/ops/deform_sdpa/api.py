"""Public function of deform_sdpa: checks, choice of the backend, dispatch."""

from torch import Tensor

from ..common import checks
from ..common.autocast import without_autocast
from ..common.backends import choose_backend
from ..common.custom_op import contiguous_like, register_attention
from ..common.dropout import dropout_seed
from . import naive

# The coordinates always come with offset groups.
deform_sdpa_op = register_attention(
    'deform_sdpa', 'q k v coords', empty_like=contiguous_like
)


def deform_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    *,
    grid_size: tuple[int, int],
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = 'auto',
) -> Tensor:
    """Attention of every query to its own sampled points of several views.

    k and v are sampled bilinearly at the coordinates of each query, zero outside the
    maps, and attended with one softmax over all V * P points::

        k[p] = bilinear(k of the point's view, x * (Wk - 1), y * (Hk - 1)), v likewise
        out = sum_p softmax_p(scale * q . k[p]) v[p]

    A point outside its map has a logit of 0 and a value of 0; it takes part in the
    softmax. Differentiable in q, k, v and coords. The backends 'torch' and 'triton'
    never hold the sampled keys and values of all queries.

    Args:
        q: (B, Vq, Hq, N, D), float16, bfloat16, float32 or float64: Vq query maps of
            N queries each, of any shape.
        k: (B, V, Hkv, Hk * Wk, D), dtype of q, Hq % Hkv == 0: V key maps, row-major.
        v: (B, V, Hkv, Hk * Wk, D), dtype of q.
        coords: (B, Vq, N, V, P, 2) points of each query in each view, shared by all
            heads, or (B, Vq, G, N, V, P, 2) with offset groups, Hq % G == 0. In
            (x, y), normalised to [0, 1] with align_corners=True: 0 and 1 are the
            centres of the first and last pixel. float32 (float64 beside a float64 q).
        grid_size: (Hk, Wk) of the key maps.
        scale: Factor of the logits. Default 1 / sqrt(D).
        dropout_p: Dropout of the attention weights, in [0, 1).
        backend: 'auto', 'naive', 'torch' or 'triton'.

    Returns:
        (B, Vq, Hq, N, D), dtype of q, also under autocast.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes or options that do not fit, or a backend that cannot
            run the call.

    Source: the public repository "Fused Deformable Scaled Dot-Product Multi-Head
    Attention (Triton)", its ``deform_sdpa_triton``, here with gradients of the
    coordinates, maps of any size, offset groups and grouped-query heads (Ainslie et
    al., "GQA", arXiv 2305.13245).
    """
    _check_maps(q, k, v)
    grid_size = checks.check_grid_size(grid_size, k.shape[3], 'pixels of k and v')
    checks.check_rate('dropout_p', dropout_p)
    scale = checks.check_scale(scale, q.shape[4])
    coords = _check_coords(coords, q, k.shape[1])
    backend = choose_backend(
        'deform_sdpa', backend, device=q.device, dtype=q.dtype, head_dim=q.shape[4]
    )
    if backend == 'naive':
        with without_autocast(q.device):
            return naive.deform_sdpa(
                q, k, v, coords, grid_size=grid_size, scale=scale, dropout_p=dropout_p
            )
    out, _ = deform_sdpa_op(
        q,
        k,
        v,
        coords,
        dropout_seed(dropout_p),
        *grid_size,
        scale,
        dropout_p,
        backend,
    )
    return out


def _check_maps(q: Tensor, k: Tensor, v: Tensor) -> None:
    checks.check_tensor('q', q, 'B Vq Hq N D')
    checks.check_tensor('k', k, 'B V Hkv Hk*Wk D')
    checks.check_tensor('v', v, 'B V Hkv Hk*Wk D')
    batch, _, heads, _, head_dim = q.shape
    views, kv_heads, pixels = k.shape[1:4]
    expected = (batch, views, kv_heads, pixels, head_dim)
    checks.check_shape('k', k, expected, '(B, V, Hkv, Hk*Wk, D)')
    checks.check_shape('v', v, k.shape, '(B, V, Hkv, Hk*Wk, D)')
    checks.check_same('k', k, 'q', q)
    checks.check_same('v', v, 'q', q)
    checks.check_heads(heads, kv_heads)
    if 0 in (views, head_dim):
        raise ValueError(f'k and v hold no views or channels, got {tuple(k.shape)}')


def _check_coords(coords: Tensor, q: Tensor, views: int) -> Tensor:
    """The coordinates with a dimension for offset groups: (B, Vq, G, N, V, P, 2)."""
    if isinstance(coords, Tensor) and coords.ndim == 6:
        coords = coords.unsqueeze(2)
    checks.check_tensor('coords', coords, 'B Vq G N V P 2')
    batch, query_views, heads, num_queries, _ = q.shape
    groups, points = coords.shape[2], coords.shape[5]
    checks.check_shape(
        'coords',
        coords,
        (batch, query_views, groups, num_queries, views, points, 2),
        '(B, Vq, N, V, P, 2) or (B, Vq, G, N, V, P, 2), here',
    )
    checks.check_groups('query heads', heads, groups)
    if points == 0:
        raise ValueError('coords hold no points (P == 0)')
    checks.check_coordinate_dtype('coords', coords, q)
    checks.check_device('coords', coords, 'q', q)
    return coords
