"""Launches of the neighborhood_attn kernels, and the sums of partial results."""

import math

import torch
from torch import Tensor

from ..common.layout import empty_tokens_like
from ..common.triton_host import layout, on_device_of_first_tensor, vector
from .block_sizes import fuses_bias_gradient
from .triton_bwd_kv import neighborhood_dkdv_kernel
from .triton_bwd_q import neighborhood_dq_kernel
from .triton_call import NeighborhoodCall
from .triton_fwd import neighborhood_fwd_kernel

# Programs that the key-parallel kernel aims at, by splitting the query heads of a kv
# head: some four a multiprocessor of a large GPU. Each split costs a partial dk, dv.
TARGET_PROGRAMS = 512


@on_device_of_first_tensor
def neighborhood_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    *,
    seed: int,
    grid_size: tuple[int, int],
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Hq, N, D), dtype of q, and lse (B, Hq, N), float32."""
    out = empty_tokens_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    call = NeighborhoodCall(
        q, k, v, rpb, seed, grid_size, kernel_size, dilation, scale, dropout_p
    )
    sizes = call.sizes('neighborhood_fwd')
    tile = call.tile(sizes.queries, sizes.keys)
    programs = call.num_patches(tile) * call.batch * call.heads
    table = call.table(tile, owns_keys=False)
    for dims in call.output_parts():
        neighborhood_fwd_kernel[(programs,)](
            q,
            k,
            v,
            table,
            out,
            lse,
            *call.input_strides(),
            *out.stride()[:3],
            **call.arguments(tile),
            **dims,
            Q_VEC=vector(layout(q)),
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
    return out, lse


@on_device_of_first_tensor
def neighborhood_attn_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    *,
    seed: int,
    grid_size: tuple[int, int],
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and rpb, in their shapes and dtypes; that of None is empty.

    The same inputs give the same bits: all sums have a fixed order.
    """
    if q.numel() == 0:
        return empty_tokens_like(q), *(
            q.new_empty(0)
            if x is None
            else torch.zeros_like(x, memory_format=torch.contiguous_format)
            for x in (k, v, rpb)
        )
    call = NeighborhoodCall(
        q, k, v, rpb, seed, grid_size, kernel_size, dilation, scale, dropout_p
    )
    grad_q, grad_rpb, stats = _backward_q(call, grad_out, out, lse)
    grad_k, grad_v = _backward_kv(call, grad_out, stats)
    return grad_q, grad_k, grad_v, grad_rpb


def _backward_q(
    call: NeighborhoodCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and rpb, and (B, Hq, N, 2): log2-sum-exp2 and delta."""
    q, rpb = call.q, call.rpb
    sizes = call.sizes('neighborhood_dq')
    # The bias gradient is a product over pairs of rows, of at least 16 on tensor cores.
    tile = call.tile(sizes.queries, sizes.keys, row_pairs=16)
    grad_q = empty_tokens_like(q)
    stats = lse.new_empty((*lse.shape, 2))
    patches, side = call.num_patches(tile), 2 * call.kernel_size - 1
    grad_rpb = None
    if rpb is not None:
        shape = (call.batch, call.heads, patches, side, side)
        grad_rpb = q.new_empty(shape, dtype=torch.float32)
    launches = call.output_parts()
    fused = fuses_bias_gradient(call.head_dim, q.dtype)
    for launch in launches:
        launch.update(QUERY_GRAD=True, BIAS_GRAD=fused and rpb is not None)
    if rpb is not None and not fused:
        launches.append(dict(launches[0], QUERY_GRAD=False, BIAS_GRAD=True))
    table = call.table(tile, owns_keys=False)
    for launch in launches:
        neighborhood_dq_kernel[(patches * call.batch * call.heads,)](
            q,
            call.k,
            call.v,
            table,
            out,
            grad_out,
            lse,
            stats,
            grad_q,
            grad_rpb,
            *call.input_strides(),
            *out.stride(),
            *grad_out.stride(),
            *grad_q.stride()[:3],
            **call.arguments(tile),
            **launch,
            Q_VEC=vector(layout(q), layout(grad_out), layout(out)),
            NB=max(16, 1 << (side - 1).bit_length()),
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
    if rpb is None:
        return grad_q, q.new_empty(0), stats
    return grad_q, grad_rpb.sum((0, 2)).to(rpb.dtype), stats


def _backward_kv(
    call: NeighborhoodCall, grad_out: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    sizes = call.sizes('neighborhood_dkdv')
    tile = call.tile(sizes.keys, sizes.queries)
    patches = call.num_patches(tile) * call.batch * call.kv_heads
    splits = min(call.heads // call.kv_heads, math.ceil(TARGET_PROGRAMS / patches))
    dtype = k.dtype if splits == 1 else torch.float32
    grad_k, grad_v = (k.new_empty((splits, *k.shape), dtype=dtype) for _ in range(2))
    table = call.table(tile, owns_keys=True)
    for dims in call.output_parts():
        neighborhood_dkdv_kernel[(patches * splits,)](
            q,
            k,
            v,
            table,
            grad_out,
            stats,
            grad_k,
            grad_v,
            *call.input_strides(),
            *grad_out.stride(),
            **call.arguments(tile),
            **dims,
            Q_VEC=vector(layout(q), layout(grad_out)),
            num_splits=splits,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
    if splits == 1:
        return grad_k[0], grad_v[0]
    return grad_k.sum(0).to(k.dtype), grad_v.sum(0).to(v.dtype)
