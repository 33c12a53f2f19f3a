"""Argument checks shared by the ops, which run them before any work starts.

Those of plain options are in ``deform_gqa.checks``; here they also take the symbols
that torch puts in the place of numbers where it traces a graph for changing sizes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deform_gqa import checks as plain_checks
from deform_gqa.checks import check_bool as check_bool  # neither is ever a symbol
from deform_gqa.checks import check_rate as check_rate

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, x: Tensor, shape: str) -> None:
    """A floating tensor of as many dimensions as ``shape`` names, e.g. 'B Hq N D'."""
    if not isinstance(x, Tensor):
        raise TypeError(f'{name} must be a torch.Tensor, got {type(x).__name__}')
    if x.ndim != len(shape.split()):
        raise ValueError(
            f'{name} must have shape ({shape.replace(" ", ", ")}), got {tuple(x.shape)}'
        )
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f'{name} must be a floating tensor, got dtype {x.dtype}')


def check_shape(name: str, x: Tensor, expected: Sequence[int], meaning: str) -> None:
    """``x.shape`` equals ``expected``; ``meaning`` names the dimensions."""
    if tuple(x.shape) != tuple(expected):
        raise ValueError(
            f'{name} must have shape {meaning} = {tuple(expected)}, '
            f'got {tuple(x.shape)}'
        )


def check_same(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Same dtype and device."""
    if x.dtype != like.dtype:
        raise TypeError(
            f'{name} must have the dtype of {like_name} ({like.dtype}), got {x.dtype}'
        )
    check_device(name, x, like_name, like)


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(
            f'{name} must be on the device of {like_name} ({like.device}), '
            f'got {x.device}'
        )


def check_int(name: str, value: Any) -> None:
    """As :func:`deform_gqa.checks.check_int`; also takes one of a traced graph."""
    is_symbol = isinstance(value, torch.SymInt)
    # torch.jit.trace, which counts FLOPs in OpenMMLab, makes tensors of all sizes.
    if not is_symbol and not (isinstance(value, Tensor) and torch.jit.is_tracing()):
        plain_checks.check_int(name, value)


def check_number(name: str, value: Any) -> None:
    """As :func:`deform_gqa.checks.check_number`; also takes a symbol."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat)):
        plain_checks.check_number(name, value)


def check_grid_size(
    grid_size: Sequence[int], count: int, cells: str = 'queries of q'
) -> tuple[int, int]:
    """(H, W) of positive integers with H * W == count; ``cells`` says of what."""
    if not isinstance(grid_size, Sequence):
        raise TypeError(
            f'grid_size must be (H, W), got {plain_checks.describe(grid_size)}'
        )
    if len(grid_size) != 2:
        raise ValueError(f'grid_size must be (H, W), got {tuple(grid_size)}')
    height, width = grid_size
    for name, side in (('grid_size[0]', height), ('grid_size[1]', width)):
        check_int(name, side)
    if height < 1 or width < 1 or height * width != count:
        raise ValueError(
            f'grid_size {(height, width)} does not hold the {count} {cells}'
        )
    return height, width


def check_scale(scale: float | None, head_dim: int) -> float:
    """The given scale, or 1 / sqrt(head_dim)."""
    if scale is None:
        return head_dim**-0.5
    check_number('scale', scale)
    if not abs(scale) < math.inf:  # isfinite would break a graph with a symbol
        raise ValueError(f'scale must be finite, got {scale}')
    return float(scale)


def check_heads(heads: int, kv_heads: int) -> None:
    """Each kv head serves as many query heads, one at least."""
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            f'the {heads} query heads must be a positive multiple of the kv heads, '
            f'got {kv_heads}'
        )


def check_channels(name: str, x: Tensor) -> None:
    """The last dimension of ``x``, its channels, is not empty."""
    if x.shape[-1] == 0:
        raise ValueError(f'{name} must have channels (D >= 1), got {tuple(x.shape)}')


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, Hq, N, D) with k and v (B, Hkv, S, D), Hq % Hkv == 0, one dtype."""
    check_tensor('q', q, 'B Hq N D')
    check_tensor('k', k, 'B Hkv S D')
    check_tensor('v', v, 'B Hkv S D')
    check_channels('q', q)
    batch, heads, _, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    check_shape('k', k, (batch, num_kv_heads, num_keys, head_dim), '(B, Hkv, S, D)')
    check_shape('v', v, k.shape, '(B, Hkv, S, D)')
    check_same('k', k, 'q', q)
    check_same('v', v, 'q', q)
    check_heads(heads, num_kv_heads)
    if num_keys == 0:
        raise ValueError('k and v hold no keys (S == 0)')


def check_pos(pos: Tensor, batch: int, like: Tensor) -> None:
    """pos (B, G, S, 2): float64 when ``like`` is float64, else float32."""
    check_tensor('pos', pos, 'B G S 2')
    if pos.shape[0] != batch or pos.shape[3] != 2:
        raise ValueError(
            f'pos must have shape (B, G, S, 2) with B = {batch}, got {tuple(pos.shape)}'
        )
    check_coordinate_dtype('pos', pos, like)


def check_coordinate_dtype(name: str, x: Tensor, like: Tensor) -> None:
    """Coordinates are float64 when ``like`` is float64, else float32."""
    wanted = torch.float64 if like.dtype == torch.float64 else torch.float32
    if x.dtype != wanted:
        raise TypeError(
            f'{name} must be {wanted} beside {like.dtype} inputs (bf16 positions are '
            f'off by up to a third of a pixel), got {x.dtype}'
        )


def check_groups(name: str, total: int, groups: int) -> None:
    if groups == 0 or total % groups:
        raise ValueError(
            f'the {total} {name} must be a multiple of the offset groups, got {groups}'
        )
