"""deform_sdpa in chunks of queries: definition in ``naive.py``."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.tile_attention import dropout_scale
from .tiled_samples import DenseSamples, GatheredSamples, make_taps

# Numbers that a chunk holds of its largest tensor: sampled channels ('gather') or
# weights of all pixels ('dense'), or of the four taps of each point if these are more.
# Chosen by measuring: chunks should stay in cache.
MAX_NUMBERS = {'gather': 2**19, 'dense': 2**20}
# Pixels of a map whose products with one query cost as much as one sampled point.
DENSE_PIXELS_PER_POINT = 32


def choose_method(pixels: int, points: int, heads_sharing: int) -> str:
    """'dense' for small maps and many points, 'gather' else. Both are exact.

    Args:
        pixels: Hk * Wk.
        points: P of a view.
        heads_sharing: Query heads that one gathered vector serves, R.
    """
    cheap = pixels * heads_sharing <= DENSE_PIXELS_PER_POINT * points
    return 'dense' if cheap else 'gather'


class _Problem:
    """The call with heads before queries, one batch element at a time.

    Q = Vq * N queries, S = V * P points of each.
    """

    def __init__(self, q, k, v, coords, grid_size, with_grad):
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.k, self.v, self.coords = k, v, coords
        self.grid_size, self.with_grad = grid_size, with_grad
        self.batch, query_views, self.heads, num_queries, head_dim = q.shape
        self.views_queries = (query_views, num_queries)
        self.num_queries = query_views * num_queries
        self.groups, self.views, self.points = coords.shape[2], *coords.shape[4:6]
        shared = math.gcd(self.heads // k.shape[2], self.heads // self.groups)
        method = choose_method(k.shape[3], self.points, shared)
        if q.is_cuda and torch.are_deterministic_algorithms_enabled():
            method = 'gather'  # scatter_add has no deterministic CUDA kernel
        self.samples = DenseSamples if method == 'dense' else GatheredSamples
        if method == 'dense':
            per_query = self.heads * self.views * max(k.shape[3], 4 * self.points)
        else:
            stacks = self.heads // shared
            per_query = stacks * self.views * self.points * max(head_dim, 4)
        self.chunk = max(1, MAX_NUMBERS[method] // per_query)

    def heads_first(self, x: Tensor) -> Tensor:
        """(Vq, Hq, N, ...) -> (Hq, Q, ...)."""
        return x.transpose(0, 1).flatten(1, 2).to(self.dtype)

    def views_first(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`heads_first`."""
        return x.unflatten(1, self.views_queries).transpose(0, 1)

    def maps(self, index: int) -> list[tuple[Tensor, Tensor | None]]:
        """Of k and v: (Hkv, V * Hk * Wk, D) and zeros for its gradient."""
        maps = []
        for x in (self.k[index], self.v[index]):
            pixels = x.transpose(0, 1).flatten(1, 2).to(self.dtype).contiguous()
            maps.append((pixels, torch.zeros_like(pixels) if self.with_grad else None))
        return maps

    def chunks(self, index: int, maps) -> Iterator[tuple]:
        """(number, queries, samples of k, samples of v) of one batch element."""
        coords = self.heads_first(self.coords[index])  # (G, Q, V, P, 2)
        per_element = -(-self.num_queries // self.chunk)
        for i, start in enumerate(range(0, self.num_queries, self.chunk)):
            queries = slice(start, start + self.chunk)
            taps = make_taps(coords[:, queries], self.grid_size)
            samples = [self.samples(*m, self.heads, taps) for m in maps]
            yield index * per_element + i, queries, *samples


def deform_sdpa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`deform_gqa.ops.deform_sdpa`; arguments are checked there.

    Returns:
        out (B, Vq, Hq, N, D), dtype of q, and lse (B, Vq, Hq, N), float32 (float64
        for float64 q).
    """
    problem = _Problem(q, k, v, coords, grid_size, with_grad=False)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:4], dtype=problem.dtype)
    for index in range(problem.batch):
        q_heads = problem.heads_first(q[index])
        out_heads = torch.empty_like(q_heads)
        lse_heads = torch.empty_like(q_heads[..., 0])
        for number, queries, k_samples, v_samples in problem.chunks(
            index, problem.maps(index)
        ):
            weights = k_samples.product(q_heads[:, queries]).mul_(scale)
            peak = weights.amax(-1, keepdim=True)
            weights.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            drop = dropout_scale(weights.shape, dropout_p, seed + number, weights)
            if drop is not None:
                weights.mul_(drop)
            out_heads[:, queries] = v_samples.combine(weights).div_(total)
            lse_heads[:, queries] = total.log_().add_(peak).squeeze(-1)
        out[index] = problem.views_first(out_heads)
        lse[index] = problem.views_first(lse_heads)
    return out, lse


def deform_sdpa_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    *,
    seed: int,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and coords, in their shapes and dtypes."""
    problem = _Problem(q, k, v, coords, grid_size, with_grad=True)
    grads = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, coords)
    )
    for index in range(problem.batch):
        maps = problem.maps(index)
        grad_q, grad_coords = _backward_element(
            problem,
            index,
            maps,
            *(problem.heads_first(x[index]) for x in (q, grad_out, out, lse)),
            seed=seed,
            scale=scale,
            dropout_p=dropout_p,
        )
        grads[0][index] = problem.views_first(grad_q)
        for grad, (_, grad_map) in zip(grads[1:3], maps, strict=True):
            grad[index] = grad_map.unflatten(1, (problem.views, -1)).transpose(0, 1)
        grads[3][index] = problem.views_first(grad_coords)
    return grads


def _backward_element(
    problem: _Problem,
    index: int,
    maps: list[tuple[Tensor, Tensor]],
    q: Tensor,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    seed: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Adds to the gradients in ``maps``; all tensors have heads first.

    Returns:
        Gradients of q (Hq, Q, D) and of coords (G, Q, V, P, 2).
    """
    grad_q = torch.empty_like(q)
    grad_coords = q.new_empty(
        problem.groups, problem.num_queries, problem.views, problem.points, 2
    )
    height, width = problem.grid_size
    row_sum = (grad_out * out).sum(-1, keepdim=True)
    for number, part, k_samples, v_samples in problem.chunks(index, maps):
        weights = k_samples.product(q[:, part]).mul_(scale)
        weights.sub_(lse[:, part].unsqueeze(-1)).exp_()
        grad_logits = v_samples.product(grad_out[:, part])
        drop = dropout_scale(weights.shape, dropout_p, seed + number, weights)
        if drop is not None:
            grad_logits.mul_(drop)
        grad_logits.sub_(row_sum[:, part]).mul_(weights).mul_(scale)
        if drop is not None:
            weights.mul_(drop)
        grad_q[:, part] = k_samples.combine(grad_logits)
        k_y, k_x = k_samples.backward(grad_logits, q[:, part])
        v_y, v_x = v_samples.backward(weights, grad_out[:, part])
        slopes = ((k_x + v_x) * (width - 1), (k_y + v_y) * (height - 1))
        grad_part = grad_coords[:, part]
        grad_part.copy_(torch.stack(slopes, dim=-1).view_as(grad_part))
    return grad_q, grad_coords
