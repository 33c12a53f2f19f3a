"""Checks of options that several modules have."""

from numbers import Integral, Real

from deform_gqa.ops.backends import BACKENDS


def is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_int(name: str, value: int, least: int) -> None:
    """Raises TypeError or ValueError with the name and the value."""
    if not is_int(value):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}')


def check_number(name: str, value: float) -> None:
    """Raises TypeError for what is neither an integer nor a float."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f'{name} must be a number, got {value!r}')


def check_rate(name: str, rate: float) -> None:
    """Raises TypeError or ValueError for what is no drop rate in [0, 1)."""
    check_number(name, rate)
    if not 0 <= rate < 1:
        raise ValueError(f'{name} must be in [0, 1), got {rate}')


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown name; whether it can run shows in a call."""
    if backend not in BACKENDS:
        raise ValueError(f'backend must be one of {BACKENDS}, got {backend!r}')


def check_size(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) from these or from one number for both.

    Raises:
        TypeError: For anything else.
        ValueError: If a side is less than 1.
    """
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(map(is_int, sides)):
        raise TypeError(f'{name} must be an integer or (height, width), got {size!r}')
    if min(sides) < 1:
        raise ValueError(f'{name} must be at least 1, got {size}')
    return sides
