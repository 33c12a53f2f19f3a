"""Argument checks shared by the ops: they run before any work starts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

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


def check_grid_size(grid_size: Sequence[int], num_queries: int) -> tuple[int, int]:
    """(H, W) of positive ints with H * W == num_queries."""
    if len(grid_size) != 2:
        raise ValueError(f'grid_size must be (H, W), got {tuple(grid_size)}')
    height, width = grid_size
    if height < 1 or width < 1 or height * width != num_queries:
        raise ValueError(
            f'grid_size {(height, width)} does not hold the {num_queries} queries of q'
        )
    return height, width


def check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f'dropout_p must be in [0, 1), got {dropout_p}')


def check_scale(scale: float | None, head_dim: int) -> float:
    """The given scale, or 1 / sqrt(head_dim)."""
    if scale is None:
        return head_dim**-0.5
    if not math.isfinite(scale):
        raise ValueError(f'scale must be finite, got {scale}')
    return float(scale)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, Hq, N, D) with k and v (B, Hkv, S, D), Hq % Hkv == 0, one dtype."""
    check_tensor('q', q, 'B Hq N D')
    check_tensor('k', k, 'B Hkv S D')
    check_tensor('v', v, 'B Hkv S D')
    batch, heads, _, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    check_shape('k', k, (batch, num_kv_heads, num_keys, head_dim), '(B, Hkv, S, D)')
    check_shape('v', v, k.shape, '(B, Hkv, S, D)')
    check_same('k', k, 'q', q)
    check_same('v', v, 'q', q)
    if num_kv_heads == 0 or heads % num_kv_heads:
        raise ValueError(
            f'the {heads} query heads must be a multiple of the kv heads, '
            f'got {num_kv_heads}'
        )
    if num_keys == 0:
        raise ValueError('k and v hold no keys (S == 0)')


def check_pos(pos: Tensor, batch: int, like: Tensor) -> None:
    """pos (B, G, S, 2): float64 when ``like`` is float64, else float32."""
    check_tensor('pos', pos, 'B G S 2')
    if pos.shape[0] != batch or pos.shape[3] != 2:
        raise ValueError(
            f'pos must have shape (B, G, S, 2) with B = {batch}, got {tuple(pos.shape)}'
        )
    wanted = torch.float64 if like.dtype == torch.float64 else torch.float32
    if pos.dtype != wanted:
        raise TypeError(
            f'pos must be {wanted} beside {like.dtype} inputs (bf16 positions are off '
            f'by up to a third of a pixel), got {pos.dtype}'
        )


def check_groups(name: str, total: int, groups: int) -> None:
    if groups == 0 or total % groups:
        raise ValueError(
            f'the {total} {name} must be a multiple of the offset groups, got {groups}'
        )
