"""Which key/value heads are merged into one.

Heads are plain tensors here, of shape (H, D, C): nothing depends on the module that
they come from. A grouping is a list of Hkv lists of head indices. As query head h reads
kv head h // (Hq / Hkv), the heads are put in the order of the lists.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

GROUPINGS = ('adjacent', 'similarity', 'activations')


@dataclasses.dataclass(frozen=True)
class SeparateGrouping:
    """Different groupings of keys and of values, each a name or lists of heads.

    In a config it is a dict with these two keys.
    """

    keys: Any = 'adjacent'
    values: Any = 'adjacent'

    @classmethod
    def parse(cls, grouping: Any) -> Any:
        """A dict as an object of this class; anything else as it is."""
        if isinstance(grouping, Mapping) and set(grouping) == {'keys', 'values'}:
            return cls(**grouping)
        return grouping


def adjacent_groups(num_heads: int, num_groups: int) -> list[list[int]]:
    """Neighbours: ``[[0, 1], [2, 3]]`` for 4 heads in 2 groups.

    Raises:
        ValueError: If ``num_groups`` does not divide ``num_heads``.
    """
    if num_groups < 1 or num_heads % num_groups:
        raise ValueError(
            f'num_groups must divide the {num_heads} heads, got {num_groups}'
        )
    size = num_heads // num_groups
    return [list(range(i, i + size)) for i in range(0, num_heads, size)]


def head_similarity(heads: Tensor, rotate: bool = False) -> Tensor:
    """Cosine similarity of each pair of heads, as (H, H) in [-1, 1].

    Args:
        heads: (H, D, C).
        rotate: Whether each pair is compared after the rotation of D channels that
            brings them closest, as suits heads that will be aligned.
    """
    heads = heads / heads.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
    if not rotate:
        return heads.flatten(1) @ heads.flatten(1).T
    products = torch.einsum('idc,jec->ijde', heads, heads)
    # the largest trace of R @ product over all rotations and reflections R
    return torch.linalg.svdvals(products).sum(-1)


def similar_groups(
    similarity: Tensor, num_groups: int, period: int | None = None
) -> list[list[int]]:
    """Groups of equal size with a large sum of similarities within them.

    Starts with neighbours, and exchanges two heads as long as that helps: the result
    is never worse than neighbours, and is the same on every machine.

    Args:
        similarity: (H, H).
        num_groups: Number of groups, which divides H.
        period: Heads may be exchanged only within consecutive blocks of so many heads,
            and in all blocks at once. None for all heads: no limit. 1 allows nothing.

    Returns:
        The groups.
    """
    num_heads = similarity.shape[0]
    period = num_heads if period is None else period
    order = torch.arange(num_heads)
    offsets = torch.arange(0, num_heads, period)
    best = _within(similarity, order, num_groups)
    improved = True
    while improved:
        improved = False
        for i in range(period):
            for j in range(i + 1, period):
                trial = order.clone()
                trial[offsets + i], trial[offsets + j] = (
                    order[offsets + j],
                    order[offsets + i],
                )
                score = _within(similarity, trial, num_groups)
                if score > best + 1e-9 * abs(best):
                    order, best, improved = trial, score, True
    groups = order.unflatten(0, (num_groups, -1)).tolist()
    if period == num_heads:
        return sorted(map(sorted, groups))
    return groups if period % len(groups[0]) else _periodic(groups, period)


def _within(similarity: Tensor, order: Tensor, num_groups: int) -> float:
    """Sum of the similarities of all pairs of heads that share a group."""
    size = len(order) // num_groups
    blocks = similarity[order][:, order].unflatten(0, (num_groups, size))
    blocks = blocks.unflatten(2, (num_groups, size))
    return float(torch.einsum('gigj->', blocks))


def check_groups(
    groups: Sequence[Sequence[int]],
    num_heads: int,
    num_groups: int,
    period: int | None = None,
) -> list[list[int]]:
    """Given groups, in an order in which a module can have them.

    Args:
        groups: The lists of heads.
        num_heads: Number of heads H.
        num_groups: Number of groups there must be.
        period: As in :func:`similar_groups`.

    Raises:
        ValueError: If they are not ``num_groups`` lists of equal length that hold each
            head once, or if the order of heads that they need breaks ``period``.
    """
    groups = [list(x) if isinstance(x, Sequence) else x for x in groups]
    if not (
        all(isinstance(group, list) for group in groups)
        and all(isinstance(head, Integral) for group in groups for head in group)
        and len(groups) == num_groups
        and len({len(group) for group in groups}) == 1
        and sorted(h for group in groups for h in group) == list(range(num_heads))
    ):
        raise ValueError(
            f'grouping must be {num_groups} lists of equal length that hold each of '
            f'the heads 0 to {num_heads - 1} once, got {groups}'
        )
    if period is None or period == num_heads:
        return groups
    if {frozenset(group) for group in groups} == {
        frozenset(group) for group in adjacent_groups(num_heads, num_groups)
    }:
        return adjacent_groups(num_heads, num_groups)
    return _periodic(groups, period)


def _periodic(groups: list[list[int]], period: int) -> list[list[int]]:
    """The groups in block order, if all blocks of ``period`` heads look alike."""
    blocks: dict[int, list[list[int]]] = {}
    for group in sorted(map(sorted, groups)):
        blocks.setdefault(group[0] // period, []).append(group)
    patterns = {
        tuple(tuple(head - block * period for head in group) for group in members)
        for block, members in blocks.items()
    }
    spread = any(len({head // period for head in group}) > 1 for group in groups)
    if spread or len(patterns) != 1:
        raise ValueError(
            f'grouping {groups} cannot be had: in this module heads can change places '
            f'only within blocks of {period} heads, and in all blocks alike'
        )
    return [group for block in sorted(blocks) for group in blocks[block]]
