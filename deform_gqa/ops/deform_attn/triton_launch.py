"""Launches of the deform_attn kernels, forward and backward, and their partial sums.

In backward, where registers allow it, one launch of the key-parallel kernel computes
all gradients but that of q; else one computes those of k and v and another those of the
bias. Key taps and packed table are made for each kernel: their layouts follow its tiles
(keys of a tile, window of a patch), which are not those of forward.
"""

import math

import torch
from torch import Tensor

from ..common.fixed_point import fixed_point_unit
from ..common.layout import empty_tokens_like
from ..common.triton_host import on_device_of_first_tensor, vector
from .block_sizes import fuses_bias_gradient
from .patches import (
    Patch,
    choose_backward_patch,
    choose_patch,
    flat_patch,
    rows_window,
)
from .triton_bwd_kv import deform_attn_dkdv_kernel
from .triton_bwd_q import deform_attn_dq_kernel
from .triton_call import DeformAttnCall
from .triton_fwd import deform_attn_fwd_kernel

# Programs that the key-parallel kernel aims at, by splitting the queries: some four
# a multiprocessor of a large GPU. Each split costs one partial dk and dv.
TARGET_PROGRAMS = 512
MAX_SPLITS = 16
# Private copies of the table gradient, against atomics that wait for each other.
MAX_COPIES = 8
MAX_COPIES_NUMEL = 2**22


@on_device_of_first_tensor
def deform_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    rpb_table: Tensor | None,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
    pos_in_range: bool,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Hq, N, D), dtype of q, and lse (B, Hq, N), float32."""
    out = empty_tokens_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    call = DeformAttnCall(
        q, k, v, pos, rpb_table, seed, grid_size, scale, dropout_p, pos_in_range
    )
    sizes = call.sizes('deform_attn_fwd')
    patch = call.patch(sizes)
    deform_attn_fwd_kernel[call.grid(patch)](
        q,
        k,
        v,
        call.key_taps(sizes),
        call.packed_table(patch),
        out,
        lse,
        *call.input_strides(),
        *out.stride()[:3],
        **call.arguments(patch),
        HS=call.heads_sharing,
        BN=sizes.keys,
        NW=min(sizes.warps, sizes.keys),
        Q_VEC=vector(q),
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    return out, lse


@on_device_of_first_tensor
def deform_attn_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    rpb_table: Tensor | None,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
    pos_in_range: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, pos and rpb_table, in their shapes and dtypes.

    Those of an absent pos and rpb_table are empty tensors. The same inputs give the
    same bits under torch.use_deterministic_algorithms: all sums have a fixed order,
    but for the table's, which is then added up in 64-bit fixed point.
    """
    if q.numel() == 0:
        return tuple(
            q.new_empty(0)
            if x is None
            else torch.zeros_like(x, memory_format=torch.contiguous_format)
            for x in (q, k, v, pos, rpb_table)
        )
    call = DeformAttnCall(
        q, k, v, pos, rpb_table, seed, grid_size, scale, dropout_p, pos_in_range
    )
    grad_q, delta = _backward_q(call, grad_out, out, lse)
    return grad_q, *_backward_kv(call, grad_out, lse, delta)


def _backward_q(
    call: DeformAttnCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    q = call.q
    sizes = call.sizes('deform_attn_dq')
    patch = call.patch(sizes)
    grad_q = empty_tokens_like(q)
    delta = torch.empty_like(lse)
    deform_attn_dq_kernel[call.grid(patch)](
        q,
        call.k,
        call.v,
        call.key_taps(sizes),
        call.packed_table(patch),
        out,
        grad_out,
        lse,
        delta,
        grad_q,
        *call.input_strides(),
        *grad_out.stride(),
        *out.stride(),
        *grad_q.stride()[:3],
        **call.arguments(patch),
        HS=call.heads_sharing,
        BN=sizes.keys,
        NW=min(sizes.warps, sizes.keys),
        Q_VEC=vector(q, grad_out, out),
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    return grad_q, delta


def _key_patch(call: DeformAttnCall, most: int, bias_grad: bool) -> tuple[Patch, int]:
    """The patch of the key-parallel kernel, and the table rows summed in it or 0."""
    if not call.has_bias:
        return flat_patch(min(most, 128), call.queries), 0
    if not bias_grad:
        return choose_patch(most, *call.map_size, call.axis_x.step), 0
    patch = choose_backward_patch(most, *call.map_size, call.axis_x.step)
    return patch, rows_window(call.axis_y.step, patch.rows)


def _num_splits(tiles: int, patches: int) -> int:
    wanted = math.ceil(TARGET_PROGRAMS / tiles)
    return max(1, min(wanted, patches, MAX_SPLITS))


def _fixed_point_unit(call: DeformAttnCall, grad_out: Tensor) -> Tensor:
    """Bounds the table's gradient: a query adds at most twice its largest d(logit).

    That is at most the product of the norms of its gradient and of a value.
    """
    largest = grad_out.float().norm(dim=-1).amax() * call.v.float().norm(dim=-1).amax()
    count = call.batch * call.queries
    return fixed_point_unit(largest * (4.0 * count / (1 - call.dropout_p)))


def _table_gradient(call: DeformAttnCall, deterministic: bool) -> Tensor:
    """(copies, Hq, Th + 4, Tw + 4) zeros; row and column 0 stand for -1."""
    table_h, table_w = call.table_size
    shape = (call.heads, table_h + 4, table_w + 4)
    copies = MAX_COPIES_NUMEL // math.prod(shape)
    copies = 1 if deterministic else max(1, min(copies, MAX_COPIES))
    dtype = torch.int64 if deterministic else torch.float32
    return call.q.new_zeros((copies, *shape), dtype=dtype)


def _backward_kv(
    call: DeformAttnCall, grad_out: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = grad_out, lse, delta
    if not call.has_bias:
        sums = _launch_kv(call, 'deform_attn_dkdv', *inputs, bias_grad=False)
    elif fuses_bias_gradient(call.head_dim, call.q.dtype, call.features):
        sums = _launch_kv(call, 'deform_attn_dkdv_dbias', *inputs)
    else:
        keys = _launch_kv(call, 'deform_attn_dkdv', *inputs, bias_grad=False)
        bias = _launch_kv(call, 'deform_attn_dbias', *inputs, key_grad=False)
        sums = *keys[:2], *bias[2:]
    grad_k, grad_v, *for_bias = sums
    return (
        grad_k.sum(0).to(call.k.dtype),
        grad_v.sum(0).to(call.v.dtype),
        *_finish_bias(call, *for_bias),
    )


def _launch_kv(
    call: DeformAttnCall,
    op: str,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_grad: bool = True,
    bias_grad: bool = True,
) -> tuple[Tensor | None, ...]:
    """Partial grad_k, grad_v, grad_pos and grad_table, and the last one's unit."""
    q, k, v = call.q, call.k, call.v
    sizes = call.sizes(op)
    patch, rows_reached = _key_patch(call, sizes.queries, bias_grad)
    tiles = math.ceil(call.keys / sizes.keys) * call.batch * call.kv_heads
    splits = _num_splits(tiles, call.num_patches(patch))
    grad_k = grad_v = grad_pos = grad_table = unit = None
    if key_grad:
        grad_k, grad_v = k.new_empty((2, splits, *k.shape), dtype=torch.float32)
    if bias_grad:
        shape = (splits, call.batch, call.heads, call.keys, 2)
        grad_pos = q.new_empty(shape, dtype=torch.float32)
        deterministic = call.features.deterministic
        grad_table = _table_gradient(call, deterministic)
        unit = _fixed_point_unit(call, grad_out) if deterministic else None
    deform_attn_dkdv_kernel[(tiles * splits,)](
        q,
        k,
        v,
        call.key_taps(sizes),
        call.packed_table(patch),
        grad_out,
        lse,
        delta,
        grad_k,
        grad_v,
        grad_pos,
        grad_table,
        unit,
        *call.input_strides(),
        *grad_out.stride(),
        **call.arguments(patch),
        num_splits=splits,
        slope_y=-call.axis_y.half * call.scale,
        slope_x=-call.axis_x.half * call.scale,
        num_copies=1 if grad_table is None else grad_table.shape[0],
        BN=sizes.keys,
        NW=min(sizes.warps, sizes.keys),
        Q_VEC=vector(q, grad_out),
        RW=rows_reached,
        FIXED=unit is not None,
        KEY_GRAD=key_grad,
        BIAS_GRAD=bias_grad,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    return grad_k, grad_v, grad_pos, grad_table, unit


def _finish_bias(
    call: DeformAttnCall,
    grad_pos: Tensor | None,
    grad_table: Tensor | None,
    unit: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums the partial gradients of pos over heads and of the table over copies."""
    if grad_pos is None:
        return call.q.new_empty(0), call.q.new_empty(0)
    by_group = grad_pos.sum(0).unflatten(1, (call.groups, -1)).sum(2)
    table_h, table_w = call.table_size
    grad_table = grad_table[:, :, 1 : 1 + table_h, 1 : 1 + table_w].sum(0)
    if unit is not None:
        grad_table = grad_table.double() / unit.double()
    return by_group, grad_table.to(call.rpb_table.dtype)
