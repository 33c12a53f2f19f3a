"""Public function of neighborhood_attn: checks, choice of the backend, dispatch."""

from torch import Tensor

from ..common import checks
from ..common.autocast import without_autocast
from ..common.backends import choose_backend
from ..common.custom_op import register_attention
from ..common.dropout import dropout_seed
from . import naive

neighborhood_attn_op = register_attention(
    'neighborhood_attn', 'q k v rpb?', 'SymInt kernel_size, SymInt dilation'
)


def neighborhood_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None = None,
    *,
    grid_size: tuple[int, int],
    kernel_size: int,
    dilation: int = 1,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = 'auto',
) -> Tensor:
    """Attention of every query to the K x K keys around it.

    Windows are clamped at the borders (every query has K * K keys) and the bias is
    indexed by relative offset + K - 1: the semantics of NATTEN 0.14 to 0.17, which
    the official DAT++ weights need. Differentiable in q, k, v and rpb.

    Args:
        q: (B, Hq, N, D), float16, bfloat16, float32 or float64; N = H * W row-major.
        k: (B, Hkv, N, D), dtype of q, Hq % Hkv == 0.
        v: (B, Hkv, N, D), dtype of q.
        rpb: (Hq, 2K - 1, 2K - 1) relative position bias, any floating dtype.
        grid_size: (H, W), each at least K * dilation.
        kernel_size: K, odd, at least 3.
        dilation: Step between the keys of a window, at least 1.
        scale: Factor of the logits. Default 1 / sqrt(D).
        dropout_p: Dropout of the attention weights, in [0, 1).
        backend: 'auto', 'naive', 'torch' or 'triton'.

    Returns:
        (B, Hq, N, D), dtype of q, also under autocast.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes or options that do not fit, or a backend that cannot
            run the call.

    Source: Hassani et al., "Neighborhood Attention Transformer" (arXiv 2204.07143)
    and "Dilated Neighborhood Attention Transformer" (arXiv 2209.15001).
    """
    checks.check_qkv(q, k, v)
    grid_size = checks.check_grid_size(grid_size, q.shape[2])
    checks.check_rate('dropout_p', dropout_p)
    scale = checks.check_scale(scale, q.shape[3])
    _check_neighborhood(q, k, rpb, grid_size, kernel_size, dilation)
    backend = choose_backend(
        'neighborhood_attn',
        backend,
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[3],
    )
    if backend == 'naive':
        options = dict(grid_size=grid_size, scale=scale, dropout_p=dropout_p)
        window = dict(kernel_size=kernel_size, dilation=dilation)
        with without_autocast(q.device):
            return naive.neighborhood_attn(q, k, v, rpb, **options, **window)
    out, _ = neighborhood_attn_op(
        q,
        k,
        v,
        rpb,
        dropout_seed(dropout_p),
        *grid_size,
        scale,
        dropout_p,
        kernel_size,
        dilation,
        backend,
    )
    return out


def _check_neighborhood(
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    grid_size: tuple[int, int],
    kernel_size: int,
    dilation: int,
) -> None:
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f'k and v must cover the map of q ({q.shape[2]} places), got {k.shape[2]}'
        )
    checks.check_int('kernel_size', kernel_size)
    checks.check_int('dilation', dilation)
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(
            f'kernel_size must be odd and at least 3, got kernel_size={kernel_size}'
        )
    if dilation < 1:
        raise ValueError(f'dilation must be at least 1, got dilation={dilation}')
    if min(grid_size) < kernel_size * dilation:
        raise ValueError(
            f'grid_size must be at least kernel_size * dilation = '
            f'{kernel_size * dilation} on both sides, got {grid_size}; pad the map'
        )
    if rpb is not None:
        checks.check_tensor('rpb', rpb, 'Hq 2K-1 2K-1')
        side = 2 * kernel_size - 1
        checks.check_shape('rpb', rpb, (q.shape[1], side, side), '(Hq, 2K-1, 2K-1)')
        checks.check_device('rpb', rpb, 'q', q)
