"""Checks of options, shared by all parts of the package.

Only the standard library is imported here, so that the shapes generator, whose worker
processes start with nothing loaded, does not have to import torch. Checks of tensors,
and of numbers that torch may trace, are in ``deform_gqa.ops.common.checks``.

Every check raises TypeError for a value of the wrong type and ValueError for one out of
range, and its message gives the argument's name and value. ``True`` and ``False`` are
not numbers.
"""

from numbers import Integral, Real
from typing import Any


def check_int(name: str, value: Any, least: int | None = None) -> None:
    """An integer, of at least ``least`` where that is given.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If it is less than ``least``.
    """
    if not _is_int(value):
        raise TypeError(f'{name} must be an integer, got {describe(value)}')
    if least is not None and value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}')


def check_number(name: str, value: Any) -> None:
    """An integer or a float.

    Raises:
        TypeError: For anything else, such as a tensor, whose gradient would be lost.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be a number, got {describe(value)}')


def check_bool(name: str, value: Any) -> None:
    """``True`` or ``False``, and nothing that could be taken for them.

    Raises:
        TypeError: For anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be a bool, got {describe(value)}')


def check_rate(name: str, rate: Any) -> None:
    """A drop rate in [0, 1).

    Raises:
        TypeError: If ``rate`` is not a number.
        ValueError: If it is out of range.
    """
    check_number(name, rate)
    if not 0 <= rate < 1:
        raise ValueError(f'{name} must be in [0, 1), got {rate}')


def check_size(name: str, size: Any) -> tuple[int, int]:
    """(height, width), given as such or as one integer for both.

    Raises:
        TypeError: For anything else.
        ValueError: If a side is less than 1.
    """
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(map(_is_int, sides)):
        raise TypeError(
            f'{name} must be an integer or (height, width), got {describe(size)}'
        )
    if min(sides) < 1:
        raise ValueError(f'{name} must be at least 1, got {size}')
    return sides


def describe(value: Any) -> str:
    """The value and its type, for messages."""
    return f'{value!r} of type {type(value).__name__}'


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
