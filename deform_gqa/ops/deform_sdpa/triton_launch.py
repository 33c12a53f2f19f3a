"""Launches of the deform_sdpa kernels, and the sums of partial results."""

import torch
from torch import Tensor

from ..common.fixed_point import fixed_point_unit, from_fixed_point
from ..common.triton_host import on_device_of_first_tensor
from .triton_bwd import deform_sdpa_bwd_kernel
from .triton_call import DeformSdpaCall, channels_last
from .triton_fwd import deform_sdpa_fwd_kernel


@on_device_of_first_tensor
def deform_sdpa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Vq, Hq, N, D), dtype of q, and lse (B, Vq, Hq, N), float32."""
    call = DeformSdpaCall(q, k, v, coords, seed, grid_size, scale, dropout_p)
    out, lse = call.new_outputs()
    if out.numel() == 0:
        return out, lse
    tile = call.tile('deform_sdpa_fwd')
    deform_sdpa_fwd_kernel[call.grid(tile)](
        call.q,
        call.k,
        call.v,
        call.coords,
        out,
        lse,
        *call.input_strides(),
        **call.arguments(tile),
        **tile.options,
    )
    return out, lse


@on_device_of_first_tensor
def deform_sdpa_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and coords, in their shapes and dtypes.

    The same inputs give the same bits under torch.use_deterministic_algorithms.
    """
    if q.numel() == 0:
        return tuple(
            torch.zeros_like(x, memory_format=torch.contiguous_format)
            for x in (q, k, v, coords)
        )
    grad_out = channels_last(grad_out)
    call = DeformSdpaCall(
        q, k, v, coords, seed, grid_size, scale, dropout_p, grad_out.stride()[:4]
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    units = _fixed_point_units(call, grad_out) if deterministic else None
    tile = call.tile('deform_sdpa_bwd' + '_fixed' * deterministic)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dtype = torch.int64 if deterministic else torch.float32
    grad_kv = k.new_zeros(2, *k.shape, dtype=dtype)
    # (B, Vq, stacks * blocks, N, V, P, 2)
    shape = (*coords.shape[:2], call.parts(tile), *coords.shape[3:])
    grad_coords = coords.new_empty(shape)
    deform_sdpa_bwd_kernel[call.grid(tile)](
        call.q,
        call.k,
        call.v,
        call.coords,
        out,
        grad_out,
        lse,
        grad_q,
        grad_kv,
        grad_coords,
        units,
        k.numel() // call.head_dim,
        *call.input_strides(),
        **call.arguments(tile),
        ATOM=tile.atomic,
        FIXED=deterministic,
        **tile.options,
    )
    grad_k, grad_v = grad_kv
    if deterministic:
        grad_k, grad_v = (
            from_fixed_point(grad, unit, grad_coords)
            for grad, unit in zip(grad_kv, units, strict=True)
        )
    if call.parts(tile) > call.groups:
        grad_coords = grad_coords.unflatten(2, (call.groups, -1)).sum(3)
    # Outputs of an op share no memory: copied even where the dtype stays.
    grad_k, grad_v = grad_k.to(k.dtype, copy=True), grad_v.to(v.dtype, copy=True)
    return grad_q, grad_k, grad_v, grad_coords


def _fixed_point_units(call: DeformSdpaCall, grad_out: Tensor) -> Tensor:
    """(2,) units of dk and dv: their sums at a pixel cannot overflow.

    The weights of one query and head sum to 1 before dropout, so it adds at most
    |grad_out| to dv, and to dk at most scale * |q| times twice the largest
    derivative of a weight, which is below the product of the norms of grad_out and v.
    """
    queries = call.query_views * call.queries
    count = queries * call.heads // call.kv_heads / (1 - call.dropout_p)
    norm_grad = grad_out.float().norm(dim=-1).amax()
    norm_v = call.v.float().norm(dim=-1).amax()
    bound_v = norm_grad * count
    bound_k = 2 * abs(call.scale) * bound_v * norm_v * call.q.float().abs().amax()
    return torch.stack([fixed_point_unit(b) for b in (bound_k, bound_v)])
