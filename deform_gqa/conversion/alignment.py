"""Heads of a group, expressed in a common basis before they are merged.

The channels of a head have no meaning of their own: if keys are multiplied by an
invertible matrix and queries by its inverse transpose, no logit changes, and neither
does the output if values and the output projection are. Two heads can therefore do the
same with weights whose mean does nothing of the kind. What may be done to a module is
its :class:`~deform_gqa.conversion.heads.Freedom`.

The *partner* of a key is the query, that of a value is the output projection. What it
does with the D channels of a head is in its Gram matrix (D, D): of the queries of head
h, E[q q^T]. All heads have shape (H, D, C), all sums are float64.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import AttentionHeads, Freedom, Moments, Projection

# Directions in which heads have less than this share of their extent are left alone.
TOLERANCE = 1e-10
ROTATIONS = 100  # steps of generalised Procrustes analysis, at most


def align(
    heads: AttentionHeads,
    num_groups: int,
    freedom: Freedom,
    moments: Moments,
    rotate: bool = False,
) -> AttentionHeads:
    """Merges each group of kv heads after aligning them as far as their module allows.

    First the biases: that of keys is dropped, that of values moves into the output
    projection's. Then, of keys and of values,

    - where any invertible matrix is allowed, the merged head is the one of D channels
      from which linear maps, which the partners absorb, recover what the heads of the
      group contribute to logits or output with the least squared error;
    - with ``rotate``, or where only rotations are allowed, heads are rotated towards
      their common mean (generalised Procrustes analysis);
    - where the partner must stay, the merged head is the mean in which each direction
      of a head counts as much as its partner reads it: again the least squares.

    Heads of a group that differ only by what is allowed are merged without any error.

    Args:
        heads: In the order of the groups.
        num_groups: Number of groups.
        freedom: What the module allows.
        moments: Second moments of the inputs, or None for the identity.
        rotate: Allow rotations instead of invertible matrices.

    Returns:
        The heads, with one kv head a group, and the partners that go with them.
    """
    heads = _without_biases(heads, freedom)
    # A constant that is added to all keys cancels; so do the means of their inputs.
    k, q = _merge_side(
        heads.k,
        heads.q.columns,
        num_groups,
        kind='rotation' if rotate and freedom.query == 'any' else freedom.query,
        moment=covariance(moments.k) if freedom.key_bias else moments.k,
        partner_moment=moments.q,
    )
    v, out = _merge_side(
        heads.v,
        heads.out,
        num_groups,
        kind=('rotation' if rotate else 'any') if freedom.value else 'none',
        moment=moments.v,
        partner_moment=None,
    )
    return AttentionHeads(heads.q.with_columns(q), k, v, out, heads.out_bias)


def _without_biases(heads: AttentionHeads, freedom: Freedom) -> AttentionHeads:
    """An equivalent module whose biases of keys and values are zero, if it may be."""
    k, v, out_bias = heads.k, heads.v, heads.out_bias
    if freedom.key_bias and k.bias is not None:
        k = dataclasses.replace(k, bias=torch.zeros_like(k.bias))
    if freedom.value_bias and v.bias is not None and out_bias is not None:
        bias = v.bias.repeat_interleave(heads.queries_per_kv_head, dim=0)
        out_bias = out_bias + torch.einsum('hd,hdc->c', bias, heads.out)
        v = dataclasses.replace(v, bias=torch.zeros_like(v.bias))
    return AttentionHeads(heads.q, k, v, heads.out, out_bias)


def covariance(moment: Tensor | None) -> Tensor | None:
    """Second moment about the mean, of inputs whose last component is 1."""
    if moment is None:
        return None
    mean = moment[:, -1]
    return moment - torch.outer(mean, mean)


def _merge_side(
    heads: Projection,
    partner: Tensor,
    num_groups: int,
    kind: str,
    moment: Tensor | None,
    partner_moment: Tensor | None,
) -> tuple[Projection, Tensor]:
    """Merged heads, and their partner (Hq, D, C') in the basis of these.

    A query head's partner matrix changes with the kv head that it reads.
    """
    share = partner.shape[0] // heads.num_heads
    root = moment_root(heads.columns, moment)
    gram = _gram(partner, partner_moment).unflatten(0, (-1, share)).sum(1)
    by_group = heads.columns.unflatten(0, (num_groups, -1))
    merged, transforms = [], []
    for x, g in zip(by_group, gram.unflatten(0, (num_groups, -1)), strict=True):
        new, transform = _MERGE_GROUP[kind](x, g, root)
        merged.append(new)
        transforms.append(transform)
    transforms = torch.cat(transforms).repeat_interleave(share, dim=0)
    return heads.with_columns(torch.stack(merged)), transforms @ partner


def _gram(x: Tensor, moment: Tensor | None) -> Tensor:
    """(H, D, D): E[x u (x u)^T] of inputs u with this second moment."""
    return x @ x.mT if moment is None else x @ moment.to(x) @ x.mT


def moment_root(like: Tensor, moment: Tensor | None) -> Tensor:
    """L with L L^T = moment, the identity for None; (C + 1, C + 1)."""
    if moment is None:
        return torch.eye(like.shape[-1], dtype=like.dtype)
    values, vectors = torch.linalg.eigh(moment.to(like))
    return vectors * values.clamp_min(0).sqrt()


def common_basis(x: Tensor, gram: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The D channels from which n heads are recovered with the least squared error.

    The error of head i is E |p_i^T (x_i - T_i^T m) u|^2 over inputs u and partners p_i.
    The m of the least sum is a truncated singular value decomposition.

    Args:
        x: (n, D, C), the heads.
        gram: (n, D, D), of their partners.
        root: (C, C), of the second moment of the inputs.

    Returns:
        m (D, C), and T (n, D, D), by which the partners are to be multiplied.
    """
    dim = x.shape[1]
    weighted = (_symmetric_root(gram) @ x).flatten(0, 1)
    left, extents, basis = torch.linalg.svd(weighted @ root, full_matrices=False)
    left, extents, basis = left[:, :dim], extents[:dim], basis[:dim]
    if len(extents) < dim:  # fewer inputs than channels
        missing = dim - len(extents)
        left, extents = F.pad(left, (0, missing)), F.pad(extents, (0, missing))
        basis = F.pad(basis, (0, 0, 0, missing))
    scale = _balance(extents, x, root)
    kept = extents > TOLERANCE * extents[0]
    inverse = torch.where(kept, 1 / extents.where(kept, torch.ones_like(extents)), 0)
    m = (scale * inverse)[:, None] * (left.mT @ weighted)
    transforms = (kept / scale)[:, None] * (basis @ (x @ root).mT)
    return m, transforms


def _balance(extents: Tensor, x: Tensor, root: Tensor) -> Tensor:
    """Scale of each merged channel (D,): its extent is shared with the partner.

    The sum of their squares is the mean of the heads', so that weights keep their size.
    """
    floor = max(TOLERANCE * float(extents[0]), 1e-300)
    scale = extents.clamp_min(floor).sqrt()
    size = (x @ root).square().sum((1, 2)).mean().clamp_min(1e-300)
    return scale * (size / scale.square().sum()).sqrt()


def common_rotation(x: Tensor, gram: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of n heads after generalised Procrustes analysis.

    As :func:`common_basis`, with T orthogonal; the partners are not weighed.
    """
    return _rotate_to_mean(x, root, _nearest_rotation)


def common_rotary(x: Tensor, gram: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`common_rotation`, by rotations of the channels i and i + D / 2."""
    return _rotate_to_mean(x, root, _nearest_rotary)


def partner_mean(x: Tensor, gram: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The m of least error where no partner may change: T is the identity.

    A direction that no partner reads gets the plain mean.
    """
    mean = x.mean(dim=0)
    pull = (gram @ (x - mean)).sum(dim=0)
    inverse = torch.linalg.pinv(gram.sum(dim=0), rtol=TOLERANCE, hermitian=True)
    return mean + inverse @ pull, torch.eye(x.shape[1], dtype=x.dtype).expand_as(gram)


_MERGE_GROUP = {
    'any': common_basis,
    'rotation': common_rotation,
    'rotary': common_rotary,
    'none': partner_mean,
}


def _rotate_to_mean(x: Tensor, root: Tensor, nearest) -> tuple[Tensor, Tensor]:
    """Rotates heads towards their mean until that no longer changes."""
    seen = x @ root
    target = seen[seen.flatten(1).norm(dim=1).argmax()]
    for _ in range(ROTATIONS):
        rotations = nearest(seen, target)
        mean = (rotations @ seen).mean(dim=0)
        change = (mean - target).norm()
        target = mean
        if change <= TOLERANCE * mean.norm():
            break
    return (rotations @ x).mean(dim=0), rotations


def _nearest_rotation(x: Tensor, target: Tensor) -> Tensor:
    """R (n, D, D), orthogonal, with the least |R x - target|."""
    left, _, right = torch.linalg.svd(target @ x.mT)
    return left @ right


def _nearest_rotary(x: Tensor, target: Tensor) -> Tensor:
    """As :func:`_nearest_rotation`, for rotations of the channels i and i + D / 2."""
    x, target = (torch.complex(*t.chunk(2, dim=-2)) for t in (x, target))
    product = (target * x.conj()).sum(-1)  # (n, D / 2)
    still = product.abs() == 0
    phase = torch.where(still, 1, product) / product.abs().masked_fill(still, 1)
    cos, sin = torch.diag_embed(phase.real), torch.diag_embed(phase.imag)
    return torch.cat([torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)], -2)


def _symmetric_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
