"""Launches of the deform_attn kernels, forward and backward, and their partial sums.

In backward, where registers allow it, one launch of the key-parallel kernel computes
all gradients but that of q; else one computes those of k and v and another those of the
bias. Key taps and packed table are made once for the kernels of a direction; taps lie
tile by tile, so once for each number of keys that a tile of them has. What launches
need beside the tensors is found once and kept, as finding it takes the host longer than
the launches do.
"""

import dataclasses
import math

import torch
from torch import Tensor

from ..common.block_sizes import BlockSizes
from ..common.fixed_point import fixed_point_unit, from_fixed_point
from ..common.layout import empty_tokens_like
from ..common.triton_host import (
    Launch,
    Layout,
    layout,
    on_device_of_first_tensor,
    vector,
)
from .block_sizes import fuses_bias_gradient
from .patches import (
    MIN_WINDOW,
    Patch,
    choose_backward_patch,
    choose_patch,
    flat_patch,
    rows_window,
    window_of,
)
from .triton_bias_inputs import BiasInputs
from .triton_bwd_kv import deform_attn_dkdv_kernel
from .triton_bwd_kv_bias import deform_attn_dkdv_dbias_kernel
from .triton_bwd_q import deform_attn_dq_kernel
from .triton_call import DeformAttnCall, deform_attn_call
from .triton_fwd import deform_attn_fwd_kernel

# Programs that the key-parallel kernel aims at, by splitting the queries: some four
# a multiprocessor of a large GPU. Each split costs one partial dk and dv.
TARGET_PROGRAMS = 512
MAX_SPLITS = 16
# Private copies of the table gradient, against atomics that wait for each other.
MAX_COPIES = 8
MAX_COPIES_NUMEL = 2**22
# Of the kernel of triton_bwd_kv_bias.py, which holds all of a head and no padding.
BY_WARP_HEAD_DIMS = (16, 32)


@dataclasses.dataclass(frozen=True)
class _QueryLaunch:
    """A launch of a query-parallel kernel, and the keys of its tiles."""

    launch: Launch
    tile: int


@dataclasses.dataclass(frozen=True)
class _KeyLaunch(_QueryLaunch):
    """One of the key-parallel kernel, and the partial sums that it writes.

    Attributes:
        key_grad: Whether it computes the gradients of k and v.
        bias_grad: Whether it computes those of pos and the table.
        by_warp: Whether it is the kernel of ``triton_bwd_kv_bias.py``.
        splits: Parts of the queries, each with a sum of its own.
        pos_shape: (splits, B, Hq, S, 2).
        table_shape: (copies, Hq, Th + 4, Tw + 4); row and column 0 stand for -1.
    """

    key_grad: bool
    bias_grad: bool
    by_warp: bool
    splits: int
    pos_shape: tuple[int, ...]
    table_shape: tuple[int, ...]

    def new_key_gradient(self, k: Tensor) -> Tensor:
        """As k, or (splits, *k.shape) in float32 where there are sums to add up."""
        if self.splits == 1:
            return k.new_empty(k.shape)
        return k.new_empty((self.splits, *k.shape), dtype=torch.float32)


@dataclasses.dataclass(frozen=True)
class _BackwardLaunches:
    bias: BiasInputs | None
    for_queries: _QueryLaunch
    for_keys: tuple[_KeyLaunch, ...]


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
    call = deform_attn_call(
        q, k, v, pos, rpb_table, grid_size, scale, dropout_p, pos_in_range
    )
    bias, forward = call.cached(_forward_launch)
    taps, table = _make_bias_inputs(bias, pos, rpb_table)
    forward.launch(
        deform_attn_fwd_kernel,
        q,
        k,
        v,
        taps.get(forward.tile),
        table,
        out,
        lse,
        seed=seed,
    )
    return out, lse


def _make_bias_inputs(
    bias: BiasInputs | None, pos: Tensor | None, rpb_table: Tensor | None
) -> tuple[dict[int, Tensor], Tensor | None]:
    return ({}, None) if bias is None else bias.make(pos, rpb_table)


def _forward_launch(call: DeformAttnCall) -> tuple[BiasInputs | None, _QueryLaunch]:
    sizes = call.sizes('deform_attn_fwd')
    patch = call.patch(sizes)
    bias = call.bias_inputs([sizes], [patch])
    options = dict(HS=call.heads_sharing, Q_VEC=vector(call.q))
    launch = Launch(
        call.grid(patch),
        (*call.input_strides(), *_token_strides(call)),
        {**call.arguments(patch, sizes, bias), **options},
    )
    return bias, _QueryLaunch(launch, sizes.keys)


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
    call = deform_attn_call(
        q, k, v, pos, rpb_table, grid_size, scale, dropout_p, pos_in_range
    )
    launches = call.cached(_backward_launches, layout(grad_out), layout(out))
    taps, table = _make_bias_inputs(launches.bias, pos, rpb_table)
    grad_q = empty_tokens_like(q)
    delta = torch.empty_like(lse)
    for_q = launches.for_queries
    for_q.launch(
        deform_attn_dq_kernel,
        q,
        k,
        v,
        taps.get(for_q.tile),
        table,
        out,
        grad_out,
        lse,
        delta,
        grad_q,
        seed=seed,
    )
    unit = None
    if call.has_bias and call.deterministic:
        unit = _fixed_point_unit(call, v, grad_out)
    grad_k = grad_v = grad_pos = grad_table = None
    for for_k in launches.for_keys:
        if for_k.key_grad:
            grad_k, grad_v = for_k.new_key_gradient(k), for_k.new_key_gradient(k)
        if for_k.bias_grad:
            grad_pos = q.new_empty(for_k.pos_shape, dtype=torch.float32)
            dtype = torch.float32 if unit is None else torch.int64
            grad_table = q.new_zeros(for_k.table_shape, dtype=dtype)
        for_k.launch(
            deform_attn_dkdv_dbias_kernel if for_k.by_warp else deform_attn_dkdv_kernel,
            q,
            k,
            v,
            taps.get(for_k.tile),
            table,
            grad_out,
            lse,
            delta,
            grad_k if for_k.key_grad else None,
            grad_v if for_k.key_grad else None,
            grad_pos,
            grad_table,
            unit if for_k.bias_grad else None,
            seed=seed,
        )
    return (
        grad_q,
        _sum_splits(grad_k, k),
        _sum_splits(grad_v, v),
        *_finish_bias(call, q, rpb_table, grad_pos, grad_table, unit),
    )


def _backward_launches(
    call: DeformAttnCall, grad_out: Layout, out: Layout
) -> _BackwardLaunches:
    if not call.has_bias:
        ops = {'deform_attn_dkdv': (True, False)}
    elif fuses_bias_gradient(call.head_dim, call.q.dtype, call.features):
        by_warp = _is_by_warp(call, key_grad=True, bias_grad=True)
        op = 'deform_attn_dkdv_dbias_by_warp' if by_warp else 'deform_attn_dkdv_dbias'
        ops = {op: (True, True)}
    else:
        ops = {'deform_attn_dkdv': (True, False), 'deform_attn_dbias': (False, True)}
    query_sizes = call.sizes('deform_attn_dq')
    query_patch = call.patch(query_sizes)
    key_sizes = [call.sizes(op) for op in ops]
    key_patches = [
        _key_patch(call, sizes.queries, *grads)
        for sizes, grads in zip(key_sizes, ops.values(), strict=True)
    ]
    bias = call.bias_inputs(
        [query_sizes, *key_sizes], [query_patch, *(patch for patch, _ in key_patches)]
    )
    options = dict(HS=call.heads_sharing, Q_VEC=vector(call.q, grad_out, out))
    strides = *grad_out.strides, *out.strides, *_token_strides(call)
    for_queries = Launch(
        call.grid(query_patch),
        (*call.input_strides(), *strides),
        {**call.arguments(query_patch, query_sizes, bias), **options},
    )
    for_keys = [
        _key_launch(call, grad_out, bias, sizes, *patch, *grads)
        for sizes, patch, grads in zip(
            key_sizes, key_patches, ops.values(), strict=True
        )
    ]
    return _BackwardLaunches(
        bias, _QueryLaunch(for_queries, query_sizes.keys), tuple(for_keys)
    )


def _token_strides(call: DeformAttnCall) -> tuple[int, int, int]:
    """Those of ``empty_tokens_like(q)`` but for the last, which is 1."""
    row = call.heads * call.head_dim
    return call.queries * row, call.head_dim, row


def _key_launch(
    call: DeformAttnCall,
    grad_out: Layout,
    bias: BiasInputs | None,
    sizes: BlockSizes,
    patch: Patch,
    rows_reached: int,
    key_grad: bool,
    bias_grad: bool,
) -> _KeyLaunch:
    tiles = math.ceil(call.keys / sizes.keys) * call.batch * call.kv_heads
    splits = _num_splits(tiles, call.num_patches(patch))
    table_shape = _table_shape(call)
    options = dict(
        num_splits=splits,
        slope_y=-call.axis_y.half * call.scale,
        slope_x=-call.axis_x.half * call.scale,
        num_copies=table_shape[0],
        Q_VEC=vector(call.q, grad_out),
        RW=rows_reached,
        FIXED=bias_grad and call.deterministic,
        KEY_GRAD=key_grad,
        BIAS_GRAD=bias_grad,
    )
    launch = Launch(
        (tiles * splits,),
        (*call.input_strides(), *grad_out.strides),
        {**call.arguments(patch, sizes, bias), **options},
    )
    pos_shape = splits, call.batch, call.heads, call.keys, 2
    return _KeyLaunch(
        launch,
        sizes.keys,
        key_grad,
        bias_grad,
        _is_by_warp(call, key_grad, bias_grad),
        splits,
        pos_shape,
        table_shape,
    )


def _is_by_warp(call: DeformAttnCall, key_grad: bool, bias_grad: bool) -> bool:
    """Whether a launch is of ``triton_bwd_kv_bias.py``: the faster form, if it fits.

    It is at the limit of the registers. Triton 3.6 spills in it where dimensions are
    masked and in deterministic mode, and more rows of the table would not fit at all.
    """
    few_rows = window_of(call.axis_y.step, 16) == MIN_WINDOW
    small = call.head_dim in BY_WARP_HEAD_DIMS and not call.deterministic
    return key_grad and bias_grad and small and few_rows


def _key_patch(
    call: DeformAttnCall, most: int, key_grad: bool, bias_grad: bool
) -> tuple[Patch, int]:
    """The patch of the key-parallel kernel, and the table rows summed in it or 0."""
    if not call.has_bias:
        return flat_patch(min(most, 128), call.queries), 0
    if not bias_grad:
        return choose_patch(most, *call.map_size, call.axis_x.step), 0
    if _is_by_warp(call, key_grad, bias_grad):
        return Patch(16, most // 16, MIN_WINDOW), MIN_WINDOW
    patch = choose_backward_patch(most, *call.map_size, call.axis_x.step)
    return patch, rows_window(call.axis_y.step, patch.rows)


def _num_splits(tiles: int, patches: int) -> int:
    wanted = math.ceil(TARGET_PROGRAMS / tiles)
    return max(1, min(wanted, patches, MAX_SPLITS))


def _table_shape(call: DeformAttnCall) -> tuple[int, ...]:
    """(copies, Hq, Th + 4, Tw + 4)."""
    table_h, table_w = call.table_size
    shape = call.heads, table_h + 4, table_w + 4
    copies = MAX_COPIES_NUMEL // math.prod(shape)
    return 1 if call.deterministic else max(1, min(copies, MAX_COPIES)), *shape


def _fixed_point_unit(call: DeformAttnCall, v: Tensor, grad_out: Tensor) -> Tensor:
    """Bounds the table's gradient: a query adds at most twice its largest d(logit).

    That is at most the product of the norms of its gradient and of a value.
    """
    largest = grad_out.float().norm(dim=-1).amax() * v.float().norm(dim=-1).amax()
    count = call.batch * call.queries
    return fixed_point_unit(largest * (4.0 * count / (1 - call.dropout_p)))


def _sum_splits(partial: Tensor, like: Tensor) -> Tensor:
    if partial.ndim == like.ndim:
        return partial
    return partial.sum(0).to(like.dtype)


def _finish_bias(
    call: DeformAttnCall,
    q: Tensor,
    rpb_table: Tensor | None,
    grad_pos: Tensor | None,
    grad_table: Tensor | None,
    unit: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums the partial gradients of pos over heads and of the table over copies."""
    if rpb_table is None:
        return q.new_empty(0), q.new_empty(0)
    by_group = grad_pos.unflatten(2, (call.groups, -1)).sum((0, 3))
    table_h, table_w = call.table_size
    grad_table = grad_table[:, :, 1 : 1 + table_h, 1 : 1 + table_w].sum(0)
    if unit is not None:
        grad_table = from_fixed_point(grad_table, unit, by_group)
    return by_group, grad_table.to(rpb_table.dtype)
