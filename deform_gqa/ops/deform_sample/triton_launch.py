"""Kernels of deform_sample: bilinear samples of a map, channels side by side.

One program samples BS positions of one offset group and loads BC channels of a pixel
at once, which are wide loads where the channels of x are contiguous
(torch.channels_last); the samples are stored so too, in (B, S, C) memory, as keys and
values are read by rows. Backward adds to the four pixels of each sample by float32
atomics, or in 64-bit fixed point, whose sum has no order, under
torch.use_deterministic_algorithms; the gradient of a position is a sum over the
channels inside its program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.fixed_point import fixed_point_unit, from_fixed_point
from ..common.triton_host import on_device_of_first_tensor

# Positions and channels of a tile: 16 values a lane of four warps, 8 in backward,
# which needs more registers.
POSITIONS, MOST_CHANNELS, MOST_CHANNELS_BACKWARD = 32, 64, 32


@triton.jit
def pixel_taps(p_pos, stride_s, stride_c, o_s, m_s, height, width):
    """Upper left pixel of each position and the weights of the lower right one."""
    o_pos = o_s.to(tl.int64) * stride_s
    # (BS,)
    b_y = tl.load(p_pos + o_pos, mask=m_s, other=0.0)
    b_x = tl.load(p_pos + o_pos + stride_c, mask=m_s, other=0.0)
    # Far outside is as good as outside, and safe to convert to an integer.
    t_y = tl.clamp((b_y + 1.0) * ((height - 1) * 0.5), -2.0, height + 1.0)
    t_x = tl.clamp((b_x + 1.0) * ((width - 1) * 0.5), -2.0, width + 1.0)
    y, x = tl.floor(t_y), tl.floor(t_x)
    return y.to(tl.int32), x.to(tl.int32), t_y - y, t_x - x


@triton.jit
def tap_address(y, x, stride_h, stride_w, height, width):
    """Offset of a pixel, and whether it is on the map."""
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w, inside


@triton.jit
def load_tap(p_x, o_c, m_c, y, x, stride_c, stride_h, stride_w, height, width):
    """(BS, BC) channels of a pixel in float32, zero outside."""
    o_pixel, inside = tap_address(y, x, stride_h, stride_w, height, width)
    p = p_x + o_pixel[:, None] + o_c[None, :] * stride_c
    return tl.load(p, mask=inside[:, None] & m_c[None, :], other=0.0).to(tl.float32)


# Not specialised: what changes with the image and aligns no load.
@triton.jit(do_not_specialize=[
    "pos_b", "pos_g", "groups", "num_keys", "height", "width",
])  # fmt: skip
def deform_sample_fwd_kernel(
    p_x, p_pos, p_out, x_b, x_c, x_h, x_w, pos_b, pos_g, pos_s, pos_c,
    groups, channels, num_keys, height, width,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # All in x: the other dimensions of a grid end at 65535.
    num_s, num_c = tl.cdiv(num_keys, BS), tl.cdiv(channels, BC)
    i_s, i_bg = tl.program_id(0) % num_s, tl.program_id(0) // (num_s * num_c)
    i_c = tl.program_id(0) // num_s % num_c
    i_b, i_g = (i_bg // groups).to(tl.int64), i_bg % groups
    o_s = i_s * BS + tl.arange(0, BS)
    o_c = i_c * BC + tl.arange(0, BC)
    m_s, m_c = o_s < num_keys, o_c < channels
    p_pos += i_b * pos_b + i_g * pos_g
    y, x, f_y, f_x = pixel_taps(p_pos, pos_s, pos_c, o_s, m_s, height, width)
    o_c = i_g.to(tl.int64) * channels + o_c
    p_x += i_b * x_b
    b_00 = load_tap(p_x, o_c, m_c, y, x, x_c, x_h, x_w, height, width)
    b_01 = load_tap(p_x, o_c, m_c, y, x + 1, x_c, x_h, x_w, height, width)
    b_10 = load_tap(p_x, o_c, m_c, y + 1, x, x_c, x_h, x_w, height, width)
    b_11 = load_tap(p_x, o_c, m_c, y + 1, x + 1, x_c, x_h, x_w, height, width)
    upper = b_00 + (b_01 - b_00) * f_x[:, None]
    lower = b_10 + (b_11 - b_10) * f_x[:, None]
    out = upper + (lower - upper) * f_y[:, None]
    # (B, S, C)
    o_token = (i_b * num_keys + o_s) * (groups * channels)
    p_out += o_token[:, None] + o_c[None, :]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=m_s[:, None] & m_c[None, :])


@triton.jit
def add_tap(
    p_dx, grad, o_c, mask, y, x, stride_c, stride_h, stride_w, height, width, unit,
    FIXED: tl.constexpr,
):  # fmt: skip
    o_pixel, inside = tap_address(y, x, stride_h, stride_w, height, width)
    p = p_dx + o_pixel[:, None] + o_c[None, :] * stride_c
    mask = mask & inside[:, None]
    if FIXED:
        tl.atomic_add(p, (grad * unit).to(tl.int64), mask=mask, sem='relaxed')
    else:
        tl.atomic_add(p, grad, mask=mask, sem='relaxed')


@triton.jit(do_not_specialize=[
    "pos_b", "pos_g", "groups", "num_keys", "height", "width",
])  # fmt: skip
def deform_sample_bwd_kernel(
    p_x, p_pos, p_grad, p_dx, p_dpos, p_unit,
    x_b, x_c, x_h, x_w, pos_b, pos_g, pos_s, pos_c, grad_b, grad_c, grad_s,
    dx_b, dx_c, dx_h, dx_w, groups, channels, num_keys, height, width,
    BS: tl.constexpr, BC: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    num_s = tl.cdiv(num_keys, BS)
    i_s, i_bg = tl.program_id(0) % num_s, tl.program_id(0) // num_s
    i_b, i_g = (i_bg // groups).to(tl.int64), i_bg % groups
    o_s = i_s * BS + tl.arange(0, BS)
    m_s = o_s < num_keys
    p_pos += i_b * pos_b + i_g * pos_g
    y, x, f_y, f_x = pixel_taps(p_pos, pos_s, pos_c, o_s, m_s, height, width)
    f_y, f_x = f_y[:, None], f_x[:, None]
    p_x += i_b * x_b
    p_dx += i_b * dx_b
    p_grad += i_b * grad_b + o_s.to(tl.int64)[:, None] * grad_s
    unit = 1.0
    if FIXED:
        unit = tl.load(p_unit)
    grad_y = tl.zeros([BS], tl.float32)
    grad_x = tl.zeros([BS], tl.float32)
    for c0 in range(0, channels, BC):
        m_c = c0 + tl.arange(0, BC) < channels
        o_c = i_g.to(tl.int64) * channels + c0 + tl.arange(0, BC)
        mask = m_s[:, None] & m_c[None, :]
        # (BS, BC)
        b_grad = tl.load(p_grad + o_c[None, :] * grad_c, mask=mask, other=0.0)
        b_grad = b_grad.to(tl.float32)
        b_00 = load_tap(p_x, o_c, m_c, y, x, x_c, x_h, x_w, height, width)
        b_01 = load_tap(p_x, o_c, m_c, y, x + 1, x_c, x_h, x_w, height, width)
        b_10 = load_tap(p_x, o_c, m_c, y + 1, x, x_c, x_h, x_w, height, width)
        b_11 = load_tap(p_x, o_c, m_c, y + 1, x + 1, x_c, x_h, x_w, height, width)
        down = (b_10 - b_00) * (1.0 - f_x) + (b_11 - b_01) * f_x
        right = (b_01 - b_00) * (1.0 - f_y) + (b_11 - b_10) * f_y
        grad_y += tl.sum(b_grad * down, 1)
        grad_x += tl.sum(b_grad * right, 1)
        upper, lower = b_grad * (1.0 - f_y), b_grad * f_y
        add_tap(
            p_dx, upper * (1.0 - f_x), o_c, mask, y, x,
            dx_c, dx_h, dx_w, height, width, unit, FIXED,
        )  # fmt: skip
        add_tap(
            p_dx, upper * f_x, o_c, mask, y, x + 1,
            dx_c, dx_h, dx_w, height, width, unit, FIXED,
        )  # fmt: skip
        add_tap(
            p_dx, lower * (1.0 - f_x), o_c, mask, y + 1, x,
            dx_c, dx_h, dx_w, height, width, unit, FIXED,
        )  # fmt: skip
        add_tap(
            p_dx, lower * f_x, o_c, mask, y + 1, x + 1,
            dx_c, dx_h, dx_w, height, width, unit, FIXED,
        )  # fmt: skip
    # (B, G, S, 2)
    p_dpos += (i_bg.to(tl.int64) * num_keys + o_s) * 2
    tl.store(p_dpos, grad_y * ((height - 1) * 0.5), mask=m_s)
    tl.store(p_dpos + 1, grad_x * ((width - 1) * 0.5), mask=m_s)


def _block_channels(channels: int, most: int) -> int:
    return min(most, triton.next_power_of_2(channels))


@on_device_of_first_tensor
def deform_sample_forward(x: Tensor, pos: Tensor) -> Tensor:
    """x (B, C, H, W) at pos (B, G, S, 2) -> (B, C, S) in (B, S, C) memory."""
    batch, channels, height, width = x.shape
    groups, keys = pos.shape[1:3]
    # Not a transposed tensor, as views must not be changed in place behind an op.
    strides = keys * channels, 1, channels
    out = x.new_empty_strided((batch, channels, keys), strides)
    if out.numel() == 0:
        return out
    channels //= groups
    block = _block_channels(channels, MOST_CHANNELS)
    tiles = triton.cdiv(keys, POSITIONS) * triton.cdiv(channels, block)
    deform_sample_fwd_kernel[(tiles * batch * groups,)](
        x,
        pos,
        out,
        *x.stride(),
        *pos.stride(),
        groups,
        channels,
        keys,
        height,
        width,
        BS=POSITIONS,
        BC=block,
        enable_fp_fusion=True,
    )
    return out


@on_device_of_first_tensor
def deform_sample_backward(
    grad_out: Tensor, x: Tensor, pos: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype and memory format, and of pos, contiguous."""
    batch, channels, height, width = x.shape
    groups, keys = pos.shape[1:3]
    deterministic = torch.are_deterministic_algorithms_enabled()
    dtype = torch.int64 if deterministic else torch.float32
    grad_x = torch.zeros_like(x, dtype=dtype)
    grad_pos = torch.zeros_like(pos, memory_format=torch.contiguous_format)
    if grad_out.numel() == 0:
        return grad_x.to(x.dtype), grad_pos
    unit = None
    if deterministic:  # a pixel gets at most the sum over all samples
        unit = fixed_point_unit(grad_out.float().abs().amax() * keys)
    channels //= groups
    deform_sample_bwd_kernel[(triton.cdiv(keys, POSITIONS) * batch * groups,)](
        x,
        pos,
        grad_out,
        grad_x,
        grad_pos,
        unit,
        *x.stride(),
        *pos.stride(),
        *grad_out.stride(),
        *grad_x.stride(),
        groups,
        channels,
        keys,
        height,
        width,
        BS=POSITIONS,
        BC=_block_channels(channels, MOST_CHANNELS_BACKWARD),
        FIXED=deterministic,
        enable_fp_fusion=True,
    )
    if deterministic:
        grad_x = from_fixed_point(grad_x, unit, grad_out)
    return grad_x.to(x.dtype), grad_pos
