"""Attention within groups of similar tokens.

What a tutorial on "grouped query attention" sketches under that name: queries are
grouped by similarity, and each attends to the tokens of its own group. (In the paper on
GQA, arXiv 2305.13245, what is grouped is heads.) No result depends on the other samples
of a batch. Group ids are integers without a gradient; attention has one.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deform_gqa.checks import check_int, describe

from ..common import checks
from ..common.autocast import without_autocast
from .api import check_inputs

GroupStrategy = Callable[[Tensor], Tensor]
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def groups_for_length(
    length: int | Tensor, tokens_per_group: int = 256
) -> int | Tensor:
    """Number of groups for a sequence: one for each ``tokens_per_group`` begun.

    With it, the time of :func:`group_attention` is linear in the length. That of
    :func:`group_queries` grows with the length times the number of groups.

    Args:
        length: Number of tokens, or an integer tensor of such.
        tokens_per_group: Tokens of a group.

    Raises:
        TypeError: If ``tokens_per_group`` is not an integer.
        ValueError: If it is less than 1.
    """
    check_int('tokens_per_group', tokens_per_group, 1)
    groups = (length + tokens_per_group - 1) // tokens_per_group
    return groups.clamp(min=1) if isinstance(groups, Tensor) else max(groups, 1)


@torch.no_grad()
def group_queries(
    queries: Tensor,
    groups: int | Tensor,
    parents: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    balanced: bool = False,
    iterations: int = 3,
) -> Tensor:
    """Group the tokens of each sample by cosine similarity.

    Spherical k-means: the first centre is the token nearest to the mean direction, each
    further one the token that is least similar to those so far. Nothing is drawn at
    random.

    Args:
        queries: (b, n, c), or (b, n, h, d), whose heads are taken together.
        groups: Number of groups, at most n; or (b,) integers, one for each sample.
        parents: (b, n) group ids of a coarser level, -1 for none: every parent is
            divided into ``groups`` groups.
        mask: (b, n) boolean, False for padding, which belongs to no group.
        balanced: Make the groups of a sample (or parent) the same size, to one token:
            tokens are put in the order of their groups, similar groups side by side,
            and that order is cut into equal parts.
        iterations: Times that the centres are moved.

    Returns:
        (b, n) int64: ids from 0 to groups - 1, and -1 for tokens without a group. With
        parents, group j of parent i has the id i * max(groups) + j.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes that do not fit, or numbers out of range.

    Source: the tutorial's ``group_queries(queries, groups)``, which is no grouping.
    """
    queries = _as_tokens(queries)
    counts = _group_counts(queries, groups)
    checks.check_bool('balanced', balanced)
    check_int('iterations', iterations, 0)
    owner = _owners(queries, parents, mask)
    if owner.numel() == 0:
        return owner
    # To read a tensor is to wait for the GPU; a plain number needs none.
    subgroups = int(groups.max()) if isinstance(groups, Tensor) else groups
    num_parents = 1 if parents is None else max(int(parents.max()) + 1, 1)
    with without_autocast(queries.device):
        x = F.normalize(queries.float() if _is_half(queries) else queries, dim=-1)
        centres = _first_centres(x, owner, num_parents, subgroups)
        ids = _nearest(x, centres, owner, counts)
        for _ in range(iterations):
            centres = _moved(x, centres, ids)
            ids = _nearest(x, centres, owner, counts)
        if balanced:
            ids = _cut_evenly(ids, centres, owner, counts)
    return ids


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_ids: Tensor,
    *,
    dropout: float = 0.0,
    group_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Attention of each token to the tokens of its own group.

    The same as attention under the mask ``group_ids[:, :, None] == group_ids[:, None]``
    with nothing for tokens of the group -1, but only pairs of one group are computed:
    groups are gathered, those of about the same size side by side. Differentiable in q,
    k and v.

    Args:
        q: (b, n, h, d), float16, bfloat16, float32 or float64.
        k: (b, n, h_kv, d), dtype of q, h % h_kv == 0.
        v: (b, n, h_kv, d), dtype of q.
        group_ids: (b, n) integers, as :func:`group_queries` returns them.
        dropout: Dropout of the attention weights, in [0, 1). It is always applied:
            pass 0 in evaluation.
        group_sizes: The size of each group, at least, in all samples. If None, they are
            counted, for which a GPU has to be waited for.

    Returns:
        (b, n, h, d), dtype of q, also under autocast; zeros where the group is -1.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes that do not fit, or ids below -1.
    """
    _check_tokens(q, k, v)
    checks.check_rate('dropout', dropout)
    check_group_ids(group_ids, q)
    if q.numel() == 0:
        return q + k.sum() + v.sum()  # empty, but part of the graph
    ids = group_ids.long()
    groups = _count_groups(ids) if group_sizes is None else len(group_sizes)
    order, start, rank = _sorted_by_group(ids, groups)
    if group_sizes is None:
        group_sizes = start.diff(dim=1).amax(dim=0).tolist()
    with without_autocast(q.device):
        outs, offset = [], ids.new_zeros(groups + 1)
        slots = 0
        for size, members in _of_similar_size(group_sizes):
            chosen = torch.tensor(members, device=ids.device)
            slot = start[:, chosen, None] + torch.arange(size, device=ids.device)
            used = slot < start[:, chosen + 1, None]
            token = order.gather(1, slot.clamp(max=ids.shape[1] - 1).flatten(1))
            outs.append(_attend_padded(q, k, v, token, used, dropout))
            offset[chosen] = (
                slots + torch.arange(len(members), device=ids.device) * size
            )
            slots += size * len(members)
        out = torch.cat(outs, dim=1) if outs else q[:, :1] * 0
    grouped = ids >= 0
    slot = torch.where(grouped, offset[ids.clamp(min=0)] + rank, 0)
    out = out[torch.arange(len(q), device=q.device)[:, None], slot]
    return torch.where(grouped[..., None, None], out, 0)


def hierarchical_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_groups_1: int,
    num_groups_2: int,
    *,
    mask: Tensor | None = None,
    balanced: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention within coarse groups, then of its outputs within parts of these.

    Both levels group the queries. The second attends from what the first returned to
    what it returned, so that a token sees its coarse group through the eyes of those
    that are most like it.

    Args:
        q: (b, n, h, d).
        k: (b, n, h_kv, d), h % h_kv == 0.
        v: (b, n, h_kv, d).
        num_groups_1: Coarse groups, at most n.
        num_groups_2: Parts of each.
        mask: (b, n) boolean, False for padding.
        balanced: As in :func:`group_queries`.
        dropout: Dropout of the attention weights of both levels.

    Returns:
        (b, n, h, d), dtype of q.

    Raises:
        TypeError: As :func:`group_queries` and :func:`group_attention`.
        ValueError: As :func:`group_queries` and :func:`group_attention`.
    """
    _check_tokens(q, k, v)
    coarse = group_queries(q, num_groups_1, mask=mask, balanced=balanced)
    fine = group_queries(q, num_groups_2, coarse, mask=mask, balanced=balanced)
    out = group_attention(q, k, v, coarse, dropout=dropout)
    return group_attention(out, out, out, fine, dropout=dropout)


def dynamic_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tokens_per_group: int = 256,
    mask: Tensor | None = None,
    balanced: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """:func:`group_attention` in as many groups as a sequence's own length asks for.

    Padding does not count: a sample has the same groups whatever batch it is in.

    Args:
        q: (b, n, h, d).
        k: (b, n, h_kv, d), h % h_kv == 0.
        v: (b, n, h_kv, d).
        tokens_per_group: As in :func:`groups_for_length`.
        mask: (b, n) boolean, False for padding.
        balanced: As in :func:`group_queries`.
        dropout: Dropout of the attention weights.

    Returns:
        (b, n, h, d), dtype of q.

    Raises:
        TypeError: As :func:`group_queries` and :func:`group_attention`.
        ValueError: As :func:`group_queries` and :func:`group_attention`.
    """
    _check_tokens(q, k, v)
    length = q.shape[1]
    if mask is not None:
        _check_mask(mask, q)
        length = mask.sum(dim=1)
    groups = groups_for_length(length, tokens_per_group)
    ids = group_queries(q, groups, mask=mask, balanced=balanced)
    return group_attention(q, k, v, ids, dropout=dropout)


def custom_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_strategy: GroupStrategy,
    attention_function: AttentionFunction,
) -> Tensor:
    """Grouped attention of two functions, such as two of this module.

    Args:
        q: (b, n, h, d).
        k: (b, n, h_kv, d), h % h_kv == 0.
        v: (b, n, h_kv, d).
        group_strategy: From q to group ids (b, n), integers from -1 (none).
        attention_function: From (q, k, v, group_ids) to (b, n, h, d).

    Returns:
        What ``attention_function`` returns.

    Raises:
        TypeError: If one of the functions is none, or ids are not integers.
        ValueError: For tensors, or ids, of shapes that do not fit, or an output that
            is not of the shape of q.
    """
    _check_tokens(q, k, v)
    functions = dict(
        group_strategy=group_strategy, attention_function=attention_function
    )
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f'{name} must be a function, got {describe(function)}')
    group_ids = group_strategy(q)
    check_group_ids(group_ids, q)
    out = attention_function(q, k, v, group_ids)
    checks.check_tensor('the output of attention_function', out, 'b n h d')
    checks.check_shape(
        'the output of attention_function', out, q.shape, '(b, n, h, d) of q'
    )
    return out


def check_group_ids(group_ids: Tensor, q: Tensor) -> None:
    """(b, n) integers on the device of q (b, n, ...).

    Raises:
        TypeError: For another type.
        ValueError: For another shape or device.
    """
    if not isinstance(group_ids, Tensor):
        raise TypeError(
            f'group_ids must be a torch.Tensor, got {type(group_ids).__name__}'
        )
    if group_ids.is_floating_point() or group_ids.dtype == torch.bool:
        raise TypeError(f'group_ids must be integers, got dtype {group_ids.dtype}')
    checks.check_shape('group_ids', group_ids, q.shape[:2], '(b, n)')
    checks.check_device('group_ids', group_ids, 'q', q)


def _as_tokens(queries: Tensor) -> Tensor:
    """(b, n, c), of tokens or heads."""
    if isinstance(queries, Tensor) and queries.ndim == 4:
        queries = queries.flatten(2)
    checks.check_tensor('queries', queries, 'b n c')
    checks.check_channels('queries', queries)
    return queries.detach()


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def _group_counts(queries: Tensor, groups: int | Tensor) -> Tensor:
    """(b,) number of groups of each sample."""
    batch, length = queries.shape[:2]
    if not isinstance(groups, Tensor):
        check_int('groups', groups, 1)
        if groups > max(length, 1):
            raise ValueError(
                f'groups must be at most the number of tokens {length}, got {groups}'
            )
        return torch.full((batch,), groups, device=queries.device)
    if groups.is_floating_point() or groups.dtype == torch.bool:
        raise TypeError(f'groups must be integers, got dtype {groups.dtype}')
    checks.check_shape('groups', groups, (batch,), '(b,)')
    checks.check_device('groups', groups, 'queries', queries)
    if batch and not 1 <= int(groups.min()) <= int(groups.max()) <= max(length, 1):
        raise ValueError(
            f'groups must be from 1 to the number of tokens {length}, got '
            f'{groups.tolist()}'
        )
    return groups


def _check_mask(mask: Tensor, q: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = getattr(mask, 'dtype', type(mask).__name__)
        raise TypeError(f'mask must be a boolean tensor (True keeps), got {found}')
    checks.check_shape('mask', mask, q.shape[:2], '(b, n)')
    checks.check_device('mask', mask, 'q', q)


def _owners(queries: Tensor, parents: Tensor | None, mask: Tensor | None) -> Tensor:
    """(b, n) the parent of each token, -1 for none."""
    if parents is None:
        owner = torch.zeros(queries.shape[:2], dtype=torch.long, device=queries.device)
    else:
        check_group_ids(parents, queries)
        owner = parents.long()
    if mask is not None:
        _check_mask(mask, queries)
        owner = owner.masked_fill(~mask, -1)
    return owner


def _first_centres(x: Tensor, owner: Tensor, parents: int, subgroups: int) -> Tensor:
    """(b, p, s, c): tokens far from each other, the first near their parent's mean.

    A parent of fewer tokens has some of them more than once.
    """
    member = owner[:, None] == torch.arange(parents, device=x.device)[:, None]
    mean = member.to(x.dtype) @ x  # (b, p, c)
    closest = (mean @ x.mT).masked_fill(~member, -math.inf)
    token = closest.argmax(dim=-1)
    centres, closest = [], torch.full_like(closest, -math.inf)
    for _ in range(subgroups):
        centre = x.gather(1, token[..., None].expand(-1, -1, x.shape[2]))
        centres.append(centre)
        closest = closest.maximum(centre @ x.mT)
        token = closest.masked_fill(~member, math.inf).argmin(dim=-1)
    return torch.stack(centres, dim=2)


def _nearest(x: Tensor, centres: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """(b, n) the id of the most similar centre of the token's own parent."""
    parents, subgroups = centres.shape[1:3]
    similarity = x @ centres.flatten(1, 2).mT  # (b, n, p * s)
    similarity = similarity.unflatten(2, (parents, subgroups))
    other = owner[..., None] != torch.arange(parents, device=x.device)
    unused = torch.arange(subgroups, device=x.device) >= counts[:, None]
    hidden = other[..., None] | unused[:, None, None]
    ids = similarity.masked_fill(hidden, -math.inf).flatten(2).argmax(dim=-1)
    return torch.where(owner >= 0, ids, -1)


def _moved(x: Tensor, centres: Tensor, ids: Tensor) -> Tensor:
    """Centres in the mean direction of their tokens; those without stay."""
    groups = centres.shape[1] * centres.shape[2]
    member = ids[:, None] == torch.arange(groups, device=x.device)[:, None]
    # A product, not index_add_, which is not deterministic on a GPU.
    total = (member.to(x.dtype) @ x).view_as(centres)
    empty = total.norm(dim=-1, keepdim=True) == 0
    return torch.where(empty, centres, F.normalize(total, dim=-1))


def _cut_evenly(ids: Tensor, centres: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """Ids of equal parts of each parent, its tokens in the order of their groups."""
    parents, subgroups = centres.shape[1:3]
    place = _along_a_path(centres, counts).flatten(1)  # (b, p * s)
    key = place.gather(1, ids.clamp(min=0)) + owner * subgroups
    key = torch.where(owner >= 0, key, -1)
    rank = key.argsort(dim=1, stable=True).argsort(dim=1)
    total = (
        owner[:, None] == torch.arange(-1, parents, device=ids.device)[:, None]
    ).sum(dim=-1)  # (b, 1 + p), those without a parent first
    start = total.cumsum(dim=1) - total
    row = (owner + 1).clamp(min=0)
    position = rank - start.gather(1, row)
    part = position * counts[:, None] // total.gather(1, row)
    return torch.where(owner >= 0, owner * subgroups + part, -1)


def _along_a_path(centres: Tensor, counts: Tensor) -> Tensor:
    """(b, p, s): the place of each centre on a path that goes to the most similar."""
    subgroups = centres.shape[2]
    similarity = centres @ centres.mT
    # Less than any cosine: those that a sample does not use come last.
    unused = torch.arange(subgroups, device=centres.device) >= counts[:, None]
    similarity.masked_fill_(unused[:, None, None], -2)
    similarity.diagonal(dim1=-2, dim2=-1).fill_(-math.inf)
    at = torch.zeros_like(centres[..., 0, 0], dtype=torch.long)
    place = torch.zeros_like(centres[..., 0], dtype=torch.long)
    for step in range(subgroups):
        here = at[..., None]
        place.scatter_(2, here, step)
        # None comes back to where it has been.
        similarity.scatter_(3, here[..., None].expand(-1, -1, subgroups, 1), -math.inf)
        row = here[..., None].expand(-1, -1, 1, subgroups)
        at = similarity.gather(2, row).squeeze(2).argmax(dim=-1)
    return place


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_inputs(q, k, v, names=('q', 'k', 'v'))
    if k.shape[1] != q.shape[1]:
        raise ValueError(
            f'k and v must have the {q.shape[1]} tokens of q, whose groups they share, '
            f'got {k.shape[1]}'
        )


def _count_groups(ids: Tensor) -> int:
    """One more than the largest id.

    Raises:
        ValueError: For ids below -1.
    """
    least, most = (int(x) for x in ids.aminmax())
    if least < -1:
        raise ValueError(f'group_ids must be at least -1, got {least}')
    return most + 1


def _sorted_by_group(ids: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in the order of their groups.

    Returns:
        order (b, n), where group g is from start[:, g] to start[:, g + 1]; start (b,
        groups + 1); and rank (b, n), the place of a token within its group.
    """
    order = ids.argsort(dim=1, stable=True)
    place = order.argsort(dim=1)
    bounds = torch.arange(groups + 1, device=ids.device).expand(len(ids), -1)
    start = torch.searchsorted(ids.gather(1, order), bounds.contiguous())
    rank = place - start.gather(1, ids.clamp(min=0))
    return order, start, rank


def _of_similar_size(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(largest size, groups), with sizes that differ by less than a factor of two."""
    found: dict[int, list[int]] = {}
    for group, size in enumerate(sizes):
        if size:
            found.setdefault((size - 1).bit_length(), []).append(group)
    return [(max(sizes[i] for i in groups), groups) for groups in found.values()]


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, token: Tensor, used: Tensor, dropout: float
) -> Tensor:
    """Attention within gathered groups.

    Args:
        q: (b, n, h, d).
        k: (b, n, h_kv, d).
        v: (b, n, h_kv, d).
        token: (b, g * m) which tokens.
        used: (b, g, m) whether a place is taken.
        dropout: Dropout of the weights.

    Returns:
        (b, g * m, h, d); of places that are not taken, anything finite.
    """
    image = torch.arange(len(q), device=q.device)[:, None]
    groups, size = used.shape[1:]
    q, k, v = (
        x[image, token].unflatten(1, (groups, size)).flatten(0, 1).transpose(1, 2)
        for x in (q, k, v)
    )
    used = used.clone()
    used[..., 0] = True  # no softmax over nothing: its gradient would be NaN
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=used.flatten(0, 1)[:, None, None],
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).unflatten(0, (-1, groups)).flatten(1, 2)
