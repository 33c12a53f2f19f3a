"""How many kv heads each attention module gets."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from deform_gqa.checks import check_int, describe

KVHeads = int | float | str | Mapping[str, int | float | str] | None


def check_pattern(option: str, pattern: Any) -> None:
    """Checks that a pattern for names is a regular expression.

    Raises:
        TypeError: If it is no string.
        ValueError: If it cannot be compiled.
    """
    if not isinstance(pattern, str):
        raise TypeError(f'{option}: patterns must be strings, got {describe(pattern)}')
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f'{option}: {pattern!r} is no regular expression: {error}'
        ) from error


def resolve_num_kv_heads(
    num_kv_heads: KVHeads, modules: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """The number of kv heads of each module that is to be converted.

    Args:
        num_kv_heads: A number of heads (int); a fraction of the query heads, as a
            float or a string such as '1/4'; a mapping from patterns, regular
            expressions that are searched for in the names of modules, to such
            numbers, of which the first that fits counts; or None, for the numbers
            that the modules have.
        modules: By name, the numbers of query heads and of kv heads of a module.

    Returns:
        Numbers by name. Modules that no pattern fits are left out.

    Raises:
        TypeError: For a number of another type.
        ValueError: For a number that does not divide the query heads of a module, or
            a pattern that fits no module.
    """
    if num_kv_heads is None:
        return {name: kv_heads for name, (_, kv_heads) in modules.items()}
    if not isinstance(num_kv_heads, Mapping):
        num_kv_heads = {'': num_kv_heads}
    for pattern in num_kv_heads:
        check_pattern('num_kv_heads', pattern)
        if not any(re.search(pattern, name) for name in modules):
            raise ValueError(
                f'num_kv_heads: the pattern {pattern!r} fits none of the attention '
                f'modules {list(modules)}'
            )
    resolved = {}
    for name, (num_heads, _) in modules.items():
        for pattern, value in num_kv_heads.items():
            if re.search(pattern, name):
                resolved[name] = _number(value, num_heads, name)
                break
    return resolved


def _number(given: Any, num_heads: int, name: str) -> int:
    value = given
    if isinstance(value, str):
        try:
            value = Fraction(value)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"num_kv_heads must be a number or a fraction such as '1/4', got "
                f'{value!r}'
            ) from error
        is_share = '/' in given or '.' in given  # '4/4' and '1.0' are no single head
        count = value * num_heads if is_share else value
    elif isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError(
                f'num_kv_heads as a fraction of the query heads must be in (0, 1], got '
                f'{value}'
            )
        count = Fraction(value).limit_denominator(num_heads) * num_heads
    else:
        check_int('num_kv_heads', value)
        count = Fraction(value)
    whole = count.denominator == 1
    if not whole or count < 1 or count > num_heads or num_heads % int(count):
        raise ValueError(
            f'num_kv_heads={given!r} does not fit {name or "the module"}: its '
            f'{num_heads} query heads cannot share {count} kv heads'
        )
    return int(count)
