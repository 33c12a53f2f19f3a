"""Numbers of kv heads: the axis along which grouped-query attention is measured."""

import dataclasses
from collections.abc import Iterable

from .fields import kv_heads_text

AS_CONFIGURED = 'config'
SHARES = ('full', 'half', 'one')
SWEEP = 'sweep'  # all, and halves down to one


@dataclasses.dataclass(frozen=True)
class Heads:
    """Numbers of heads of an attention, or of those of each stage of a backbone."""

    query: tuple[int, ...]
    kv: tuple[int, ...]

    def __str__(self) -> str:
        """'1 2 4 4 of 2 4 8 16', or 'all'."""
        return kv_heads_text(join(self.kv), join(self.query))


def join(counts: Iterable[int]) -> str:
    return ' '.join(map(str, counts))


def kv_head_count(num_heads: int, choice: str) -> int:
    """Heads for 'full', 'half', 'one', or the largest divisor up to a number."""
    if choice in SHARES:
        share = {'full': num_heads, 'half': num_heads // 2, 'one': 1}[choice]
    else:
        share = min(int(choice), num_heads)
    return max(n for n in range(1, max(share, 1) + 1) if num_heads % n == 0)


def kv_head_counts(num_heads: int, choices: Iterable[str]) -> list[int]:
    """Numbers of kv heads, once each."""
    counts: list[int] = []
    for choice in choices:
        if choice == SWEEP:
            halvings = range(num_heads.bit_length())
            shares = [num_heads >> n for n in halvings if num_heads % (1 << n) == 0]
            counts += [*shares, 1]
        else:
            counts.append(kv_head_count(num_heads, choice))
    return list(dict.fromkeys(counts))
