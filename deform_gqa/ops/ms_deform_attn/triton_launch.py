"""Launches of the kernels of ms_deform_attn."""

import torch
import triton
from torch import Tensor

from ..common.fixed_point import fixed_point_unit, from_fixed_point
from ..common.triton_host import on_device_of_first_tensor
from .triton_bwd import ms_deform_attn_bwd_kernel
from .triton_fwd import ms_deform_attn_fwd_kernel

# Backward exchanges what it adds between lanes, for atomics of 16 bytes: within one
# warp that needs no barriers.
WARPS_FORWARD, WARPS_BACKWARD = 4, 1
# Channels of a warp: 16 bytes a lane, in 16-bit values.
CHANNELS = 32 * 8


def _constants(value: Tensor, locations: Tensor, logits: bool, warps: int) -> dict:
    heads, levels, points = locations.shape[2:5]
    dim = value.shape[3]
    padded = triton.next_power_of_2(dim)
    return dict(
        HEADS=heads,
        GROUP=heads // value.shape[2],
        LEVELS=levels,
        POINTS=points,
        D=dim,
        LOGITS=logits,
        BQ=max(1, warps * CHANNELS // padded),
        BD=padded,
        BE=triton.next_power_of_2(levels * points),
        num_warps=warps,
        enable_fp_fusion=True,
    )


def _programs(locations: Tensor, tile: int) -> int:
    batch, num_queries, heads = locations.shape[:3]
    return batch * heads * triton.cdiv(num_queries, tile)


def _with_channels_in_a_row(value: Tensor) -> Tensor:
    return value if value.stride(3) == 1 else value.contiguous()


@on_device_of_first_tensor
def ms_deform_attn_forward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    logits: bool,
) -> Tensor:
    """Returns (B, Q, M * D), dtype of value."""
    batch, num_queries, heads = locations.shape[:3]
    out = value.new_empty((batch, num_queries, heads * value.shape[3]))
    if out.numel() == 0:
        return out
    value = _with_channels_in_a_row(value)
    constants = _constants(value, locations, logits, WARPS_FORWARD)
    ms_deform_attn_fwd_kernel[(_programs(locations, constants['BQ']),)](
        value,
        shapes.contiguous(),
        starts.contiguous(),
        locations.contiguous(),
        weights.contiguous(),
        out,
        *value.stride()[:3],
        num_queries,
        **constants,
    )
    return out


@on_device_of_first_tensor
def ms_deform_attn_backward(
    grad_out: Tensor,
    out: Tensor,
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, in their dtypes, contiguous."""
    fixed = torch.are_deterministic_algorithms_enabled()
    grad_value = torch.zeros(
        value.shape, dtype=torch.int64 if fixed else torch.float32, device=value.device
    )
    grad_locations, grad_weights = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (locations, weights)
    )
    if out.numel() == 0:
        return grad_value.to(value.dtype), grad_locations, grad_weights
    value = _with_channels_in_a_row(value)
    unit = _unit(grad_out, weights, value, logits) if fixed else None
    constants = _constants(value, locations, logits, WARPS_BACKWARD)
    ms_deform_attn_bwd_kernel[(_programs(locations, constants['BQ']),)](
        grad_out.contiguous(),
        out,
        value,
        shapes.contiguous(),
        starts.contiguous(),
        locations.contiguous(),
        weights.contiguous(),
        grad_value,
        grad_locations,
        grad_weights,
        unit,
        *value.stride()[:3],
        value.shape[1],
        locations.shape[1],
        FIXED=fixed,
        **constants,
    )
    if fixed:
        # Logits that give no weights leave nan there, and ordinary numbers in sums.
        grad_value = from_fixed_point(grad_value, unit, grad_weights)
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _unit(grad_out: Tensor, weights: Tensor, value: Tensor, logits: bool) -> Tensor:
    """For fixed-point sums: a pixel gets at most what all samples of its head give."""
    bound = grad_out.float().abs().amax() * weights.shape[1]
    bound = bound * (weights.shape[2] // value.shape[2])
    if not logits:  # else the weights of a query sum up to 1
        bound = bound * weights.float().abs().sum((3, 4)).amax()
    return fixed_point_unit(bound)
