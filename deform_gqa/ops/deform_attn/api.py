"""Public function of deform_attn: checks, choice of the backend, dispatch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import checks
from ..common.autocast import without_autocast
from ..common.backends import choose_backend
from ..common.custom_op import register_attention
from ..common.dropout import dropout_seed
from ..common.heads import repeat_kv
from . import naive

deform_attn_op = register_attention(
    'deform_attn', 'q k v pos? rpb_table?', 'bool pos_in_range'
)


def deform_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None = None,
    rpb_table: Tensor | None = None,
    *,
    grid_size: tuple[int, int],
    scale: float | None = None,
    dropout_p: float = 0.0,
    pos_in_range: bool = False,
    backend: str = 'auto',
) -> Tensor:
    """Attention to shared sampled keys with an interpolated relative position bias.

    The deformable attention of DAT after its sampling, with grouped-query heads::

        out = softmax(scale * q k^T + bias) v
        bias[b, h, n = (i, j), s] = bilinear(rpb_table[h], t_y, t_x), zero outside
        t_y = (Th - 1) / 2 * (i / (H - 1) + (1 - pos_y) / 2)    (t_x likewise)

    with i / (H - 1) := 1/2 where H == 1. Differentiable in q, k, v, pos and
    rpb_table. The backends 'torch' and 'triton' never hold an N x S x heads tensor.

    Args:
        q: (B, Hq, N, D), float16, bfloat16, float32 or float64; N = H * W row-major.
        k: (B, Hkv, S, D), dtype of q, Hq % Hkv == 0.
        v: (B, Hkv, S, D), dtype of q.
        pos: (B, G, S, 2) positions of the keys in (y, x), normalised to [-1, 1] with
            align_corners=True; Hq % G == 0. float32 (float64 beside a float64 q).
            Needed with ``rpb_table`` only. The backends 'torch' and 'triton' give a key
            whose position is NaN a bias of 0; of naive the outputs are NaN then.
        rpb_table: (Hq, Th, Tw) learned bias over relative positions, any floating
            dtype.
        grid_size: (H, W) of the query map.
        scale: Factor of the logits. Default 1 / sqrt(D).
        dropout_p: Dropout of the attention weights, in [0, 1).
        pos_in_range: Promise that \\|pos\\| <= 1; lets kernels drop bounds checks.
        backend: 'auto', 'naive', 'torch' or 'triton'.

    Returns:
        (B, Hq, N, D), dtype of q, also under autocast.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes or options that do not fit, or a backend that cannot
            run the call.

    Source: Xia et al., "Vision Transformer with Deformable Attention"
    (arXiv 2201.00520) and "DAT++" (arXiv 2309.01430), their ``DAttentionBaseline``;
    Ainslie et al., "GQA" (arXiv 2305.13245).
    """
    checks.check_qkv(q, k, v)
    grid_size = checks.check_grid_size(grid_size, q.shape[2])
    checks.check_rate('dropout_p', dropout_p)
    scale = checks.check_scale(scale, q.shape[3])
    checks.check_bool('pos_in_range', pos_in_range)
    _check_bias(q, k, pos, rpb_table)
    biased = rpb_table is not None  # without a bias torch's own attention is faster
    backend = choose_backend(
        'deform_attn',
        backend,
        weights=_count_weights(q, k) if biased else None,
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[3],
    )
    if backend == 'naive':
        options = dict(grid_size=grid_size, scale=scale, dropout_p=dropout_p)
        with without_autocast(q.device):
            return naive.deform_attn(q, k, v, pos, rpb_table, **options)
    if rpb_table is None:
        if backend == 'torch' and _has_fused_attention(q, dropout_p):
            return _fused_attention(q, k, v, scale, dropout_p)
        pos = None
    out, _ = deform_attn_op(
        q,
        k,
        v,
        pos,
        rpb_table,
        dropout_seed(dropout_p),
        *grid_size,
        scale,
        dropout_p,
        pos_in_range,
        backend,
    )
    return out


def _count_weights(q: Tensor, k: Tensor) -> int:
    # Not numel(), which would make constants of the sizes that torch.export traces.
    batch, heads, num_queries, _ = q.shape
    return batch * heads * num_queries * k.shape[2]


def _has_fused_attention(q: Tensor, dropout_p: float) -> bool:
    """Whether torch's own attention holds no N x S weights, given strides of 1 in D.

    Its fused kernels take no dropout on CPUs, and on GPUs neither float64 nor, in
    float32, rows that are not aligned.
    """
    if q.is_cuda:
        return q.dtype != torch.float64 and q.shape[3] % 8 == 0
    return dropout_p == 0.0


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float
) -> Tensor:
    k, v = (repeat_kv(x, q.shape[1]) for x in (k, v))
    with without_autocast(q.device):
        return F.scaled_dot_product_attention(
            *(_with_unit_stride(x) for x in (q, k, v)),
            dropout_p=dropout_p,
            scale=scale,
        )


def _with_unit_stride(x: Tensor) -> Tensor:
    """x, copied unless its last dimension is dense."""
    if x.stride(-1) == 1:
        return x
    # Not contiguous(): it leaves the stride of a dimension of size 1 as it is.
    return x.clone(memory_format=torch.contiguous_format)


def _check_bias(
    q: Tensor, k: Tensor, pos: Tensor | None, rpb_table: Tensor | None
) -> None:
    """The positions are looked at also where there is no table to read at them."""
    if rpb_table is not None:
        _check_table(q, rpb_table)
        if pos is None:
            raise ValueError('pos must be given with rpb_table, got None')
    if pos is not None:
        _check_key_positions(q, k, pos)


def _check_table(q: Tensor, rpb_table: Tensor) -> None:
    checks.check_tensor('rpb_table', rpb_table, 'Hq Th Tw')
    heads, table_h, table_w = rpb_table.shape
    if heads != q.shape[1] or 0 in (table_h, table_w):
        raise ValueError(
            f'rpb_table must have shape (Hq, Th, Tw) with Hq = {q.shape[1]}, '
            f'got {tuple(rpb_table.shape)}'
        )
    checks.check_device('rpb_table', rpb_table, 'q', q)


def _check_key_positions(q: Tensor, k: Tensor, pos: Tensor) -> None:
    checks.check_pos(pos, q.shape[0], q)
    if pos.shape[2] != k.shape[2]:
        raise ValueError(
            f'pos must hold one position for each of the {k.shape[2]} keys, '
            f'got {pos.shape[2]}'
        )
    checks.check_groups('query heads', q.shape[1], pos.shape[1])
    checks.check_device('pos', pos, 'q', q)
