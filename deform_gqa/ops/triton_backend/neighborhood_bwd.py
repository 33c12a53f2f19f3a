"""Backward of neighborhood_attn: launches its two kernels, adds partial results."""

import math

import torch
from torch import Tensor

from ..layout import empty_tokens_like
from .block_sizes import fuses_bias_gradient
from .device import on_device_of_first_tensor
from .neighborhood_bwd_kv import neighborhood_dkdv_kernel
from .neighborhood_bwd_q import neighborhood_dq_kernel
from .neighborhood_problem import NeighborhoodProblem
from .problem import vector

# Programs that the key-parallel kernel aims at, by splitting the query heads of a kv
# head: some four a multiprocessor of a large GPU. Each split costs a partial dk, dv.
TARGET_PROGRAMS = 512


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
    problem = NeighborhoodProblem(
        q, k, v, rpb, seed, grid_size, kernel_size, dilation, scale, dropout_p
    )
    grad_q, grad_rpb, stats = _backward_q(problem, grad_out, out, lse)
    grad_k, grad_v = _backward_kv(problem, grad_out, stats)
    return grad_q, grad_k, grad_v, grad_rpb


def _backward_q(
    problem: NeighborhoodProblem, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and rpb, and (B, Hq, N, 2): log2-sum-exp2 and delta."""
    q, rpb = problem.q, problem.rpb
    sizes = problem.sizes('neighborhood_dq')
    # The bias gradient is a product over pairs of rows, of at least 16 on tensor cores.
    tile = problem.tile(sizes.queries, sizes.keys, row_pairs=16)
    grad_q = empty_tokens_like(q)
    stats = lse.new_empty((*lse.shape, 2))
    patches, side = problem.num_patches(tile), 2 * problem.kernel_size - 1
    grad_rpb = None
    if rpb is not None:
        shape = (problem.batch, problem.heads, patches, side, side)
        grad_rpb = q.new_empty(shape, dtype=torch.float32)
    launches = problem.output_parts()
    fused = fuses_bias_gradient(problem.head_dim, q.dtype)
    for launch in launches:
        launch.update(QUERY_GRAD=True, BIAS_GRAD=fused and rpb is not None)
    if rpb is not None and not fused:
        launches.append(dict(launches[0], QUERY_GRAD=False, BIAS_GRAD=True))
    table = problem.table(tile, owns_keys=False)
    for launch in launches:
        neighborhood_dq_kernel[(patches * problem.batch * problem.heads,)](
            q,
            problem.k,
            problem.v,
            table,
            out,
            grad_out,
            lse,
            stats,
            grad_q,
            grad_rpb,
            *problem.input_strides(),
            *out.stride(),
            *grad_out.stride(),
            *grad_q.stride()[:3],
            **problem.arguments(tile),
            **launch,
            Q_VEC=vector(q, grad_out, out),
            NB=max(16, 1 << (side - 1).bit_length()),
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
    if rpb is None:
        return grad_q, q.new_empty(0), stats
    return grad_q, grad_rpb.sum((0, 2)).to(rpb.dtype), stats


def _backward_kv(
    problem: NeighborhoodProblem, grad_out: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v = problem.q, problem.k, problem.v
    sizes = problem.sizes('neighborhood_dkdv')
    tile = problem.tile(sizes.keys, sizes.queries)
    patches = problem.num_patches(tile) * problem.batch * problem.kv_heads
    splits = min(
        problem.heads // problem.kv_heads, math.ceil(TARGET_PROGRAMS / patches)
    )
    dtype = k.dtype if splits == 1 else torch.float32
    grad_k, grad_v = (k.new_empty((splits, *k.shape), dtype=dtype) for _ in range(2))
    table = problem.table(tile, owns_keys=True)
    for dims in problem.output_parts():
        neighborhood_dkdv_kernel[(patches * splits,)](
            q,
            k,
            v,
            table,
            grad_out,
            stats,
            grad_k,
            grad_v,
            *problem.input_strides(),
            *grad_out.stride(),
            **problem.arguments(tile),
            **dims,
            Q_VEC=vector(q, grad_out),
            num_splits=splits,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
    if splits == 1:
        return grad_k[0], grad_v[0]
    return grad_k.sum(0).to(k.dtype), grad_v.sum(0).to(v.dtype)
