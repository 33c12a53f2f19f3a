"""The maps of a call: their sizes, and where each begins among the keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import checks

Pairs = Sequence[Sequence[int]]
INTEGERS = (torch.int32, torch.int64)


def shapes_tensor(spatial_shapes: Tensor | Pairs) -> Tensor:
    """spatial_shapes as a tensor (L, 2) of integers; a list becomes one on the CPU."""
    if not isinstance(spatial_shapes, Tensor):
        pairs = _checked_pairs(spatial_shapes)
        return torch.tensor(pairs, dtype=torch.int64).view(len(pairs), 2)
    _check_integers('spatial_shapes', spatial_shapes)
    if spatial_shapes.ndim != 2 or spatial_shapes.shape[1] != 2:
        raise ValueError(
            f'spatial_shapes must have shape (L, 2), got {tuple(spatial_shapes.shape)}'
        )
    return spatial_shapes


def _checked_pairs(pairs: Pairs) -> list[list[int]]:
    if not isinstance(pairs, Sequence):
        raise TypeError(
            'spatial_shapes must be a tensor or a list of (H, W), '
            f'got {type(pairs).__name__}'
        )
    for level, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f'spatial_shapes[{level}] must be (H, W), got {pair!r}')
        for side in pair:
            checks.check_int(f'spatial_shapes[{level}]', side)
    return [list(pair) for pair in pairs]


def starts_tensor(starts: Tensor | Sequence[int] | None, shapes: Tensor) -> Tensor:
    """level_start_index as a tensor (L,); from the sizes where it is None."""
    if starts is None:
        sizes = shapes[:, 0] * shapes[:, 1]
        return sizes.cumsum(0) - sizes
    if not isinstance(starts, Tensor):
        if not isinstance(starts, Sequence):
            raise TypeError(
                'level_start_index must be a tensor, a list of integers or None, '
                f'got {type(starts).__name__}'
            )
        for start in starts:
            checks.check_int('level_start_index', start)
        starts = torch.tensor(starts, dtype=torch.int64)
    _check_integers('level_start_index', starts)
    checks.check_shape('level_start_index', starts, shapes.shape[:1], '(L,)')
    return starts


def _check_integers(name: str, x: Tensor) -> None:
    if x.dtype not in INTEGERS:
        raise TypeError(f'{name} must hold int32 or int64, got dtype {x.dtype}')


def check_levels(
    shapes: list[list[int]], starts: list[int], num_keys: int
) -> list[tuple[int, int, int]]:
    """(H, W, start) of every level; together they hold the keys, in their order."""
    levels, start = [], 0
    for (height, width), given in zip(shapes, starts, strict=True):
        if height < 0 or width < 0:
            raise ValueError(
                f'spatial_shapes must not be negative, got {(height, width)}'
            )
        if given != start:
            raise ValueError(
                f'level_start_index must add up the sizes of spatial_shapes {shapes}, '
                f'got {starts}'
            )
        levels.append((height, width, start))
        start += height * width
    if start != num_keys:
        raise ValueError(
            f'spatial_shapes {shapes} hold {start} keys, value holds {num_keys}'
        )
    return levels
