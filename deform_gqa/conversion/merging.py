"""How the key/value heads of a group become one.

Heads are plain tensors here: nothing depends on the module that they come from. All
functions work on heads in the order of their groups: group g of n heads is
``heads[g * n : (g + 1) * n]``.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .alignment import align
from .heads import AttentionHeads, Freedom, Moments, Projection

MERGES = ('mean', 'first', 'random', 'norm', 'aligned', 'rotated', 'learned')


def merge_heads(
    heads: AttentionHeads,
    groups: Sequence[Sequence[int]],
    merge: str = 'mean',
    *,
    value_groups: Sequence[Sequence[int]] | None = None,
    freedom: Freedom | None = None,
    moments: Moments | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> AttentionHeads:
    """Merges the kv heads of each group, and orders the query heads accordingly.

    Args:
        heads: The heads of a trained module, Hkv of keys and values.
        groups: Lists of kv heads, all of the same length.
        merge: 'mean'; 'first' head of the group; 'random', new weights of the scale of
            the old ones, and no bias; 'norm', the mean weighted by the heads' norms;
            'aligned', see :func:`deform_gqa.conversion.alignment.align`; 'rotated',
            the same by rotations alone; 'learned', a sum with ``weights``.
        value_groups: Those of the values, if they are not those of the keys.
        freedom: What may be done to the heads to align them; None for nothing.
        moments: Second moments of the inputs, by which alignment weighs their
            directions; None for all alike.
        weights: For 'learned', two tensors (Hkv,), for keys and values, each in the
            order of its groups.
        generator: For 'random'.

    Returns:
        The heads, with one kv head a group. Query heads, and the columns of the output
        projection that read them, are in the order of the groups of the keys.

    Raises:
        ValueError: For an unknown ``merge``, or 'learned' without ``weights``.
    """
    if merge not in MERGES:
        raise ValueError(f'merge must be one of {MERGES}, got {merge!r}')
    order = [head for group in groups for head in group]
    heads = heads.reordered(order)
    if value_groups is None:
        positions = list(range(len(order)))
    else:
        positions = [order.index(head) for group in value_groups for head in group]
    # Values, and what reads them, in their own order: merging keeps the sides apart.
    columns = torch.as_tensor(heads.query_order(positions))
    heads = dataclasses.replace(heads, v=heads.v[positions], out=heads.out[columns])
    merged = _merge_ordered(
        heads,
        len(groups),
        merge,
        Freedom('none', False, False, False) if freedom is None else freedom,
        Moments() if moments is None else moments,
        weights,
        generator,
    )
    return dataclasses.replace(merged, out=merged.out[columns.argsort()])


def _merge_ordered(
    heads: AttentionHeads,
    count: int,
    merge: str,
    freedom: Freedom,
    moments: Moments,
    weights: tuple[Tensor, Tensor] | None,
    generator: torch.Generator | None,
) -> AttentionHeads:
    """:func:`merge_heads` for groups of neighbours."""
    if merge in ('aligned', 'rotated'):
        return align(heads, count, freedom, moments, rotate=merge == 'rotated')
    if merge == 'random':
        k, v = (draw(x, count, generator) for x in (heads.k, heads.v))
    else:
        k_weights, v_weights = _weights(heads, count, merge, weights)
        k = weighted_sum(heads.k, k_weights)
        v = weighted_sum(heads.v, v_weights)
    return dataclasses.replace(heads, k=k, v=v)


def weighted_sum(heads: Projection, weights: Tensor) -> Projection:
    """One head a group: the sum of its heads with weights (groups, n)."""
    columns = heads.columns.unflatten(0, weights.shape)
    weights = weights.to(columns)
    return heads.with_columns(torch.einsum('gndc,gn->gdc', columns, weights))


def draw(
    heads: Projection, count: int, generator: torch.Generator | None
) -> Projection:
    """``count`` new heads: normal weights with the deviation of the old, no bias."""
    weight = torch.randn(
        count, *heads.weight.shape[1:], generator=generator, dtype=heads.weight.dtype
    )
    bias = None if heads.bias is None else heads.bias.new_zeros(count, weight.shape[1])
    return Projection(weight * heads.weight.std(correction=0), bias)


def _weights(
    heads: AttentionHeads,
    count: int,
    merge: str,
    weights: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Weights of the heads in their group, (groups, n), for keys and for values."""
    if merge == 'learned':
        if weights is None:
            raise ValueError("merge='learned' needs weights, got None")
        return tuple(x.reshape(count, -1) for x in weights)
    return tuple(_fixed_weights(x, count, merge) for x in (heads.k, heads.v))


def _fixed_weights(heads: Projection, count: int, merge: str) -> Tensor:
    shape = (count, heads.num_heads // count)
    if merge == 'first':
        weights = heads.weight.new_zeros(shape)
        weights[:, 0] = 1
        return weights
    if merge == 'mean':
        return heads.weight.new_full(shape, 1 / shape[1])
    norms = heads.columns.flatten(1).norm(dim=1).clamp_min(1e-300).reshape(shape)
    return norms / norms.sum(dim=1, keepdim=True)
