"""Attention that chooses: keys for each query, or query heads for each kv head."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deform_gqa.checks import check_int

from ..common import checks
from ..common.autocast import without_autocast
from .api import attend_grouped, check_inputs

# (query, key, head) logits that sparse_gqa holds at a time.
MAX_SPARSE_LOGITS = 2**24


def sparse_gqa(
    q: Tensor, k: Tensor, v: Tensor, num_keys: int, *, dropout: float = 0.0
) -> Tensor:
    """Attention of each query and head to the keys with its largest logits.

    The softmax is over ``num_keys`` keys, the others have a weight of zero; with as
    many as there are, this is plain attention. Which keys these are has no gradient,
    what they contribute has. All logits are computed to choose from, a block of
    queries at a time, and once more in backward: it saves no time. Of keys with equal
    logits any may be chosen.

    Args:
        q: (b, n, h, d), float16, bfloat16, float32 or float64.
        k: (b, s, h_kv, d), dtype of q, h % h_kv == 0.
        v: (b, s, h_kv, d), dtype of q.
        num_keys: Keys of a query; more than s count as s.
        dropout: Dropout of the attention weights, in [0, 1). It is always applied:
            pass 0 in evaluation.

    Returns:
        (b, n, h, d), dtype of q, also under autocast.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes or options that do not fit.

    Source: Zhao et al., "Explicit Sparse Transformer" (arXiv 1912.11637).
    """
    check_inputs(q, k, v, names=('q', 'k', 'v'))
    check_int('num_keys', num_keys, 1)
    checks.check_rate('dropout', dropout)
    if q.numel() == 0:
        return q + k.sum() + v.sum()  # empty, but part of the graph
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    num_keys = min(num_keys, k.shape[2])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_largest(q, k, num_keys),
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    block_size = max(1, MAX_SPARSE_LOGITS // (q.shape[:2].numel() * k.shape[2]))
    blocks = []
    with without_autocast(q.device):
        for block in q.split(block_size, dim=2):
            if torch.is_grad_enabled():
                blocks.append(checkpoint(attend, block, k, v, use_reentrant=False))
            else:
                blocks.append(attend(block, k, v))
    return torch.cat(blocks, dim=2).transpose(1, 2)


@torch.no_grad()
def _largest(q: Tensor, k: Tensor, num_keys: int) -> Tensor:
    """(b, h, n, s), True for the keys with the largest logits."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    logits = (grouped @ k[:, :, None].mT).flatten(1, 2)
    chosen = logits.topk(num_keys, dim=-1, sorted=False).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)


@torch.no_grad()
def key_driven_allocation(k: Tensor, num_heads: int) -> Tensor:
    """How many query heads read each kv head: more for keys of a larger norm.

    Every kv head has one; the others are shared out in proportion to the norms of the
    keys, by largest remainders. Each sample is on its own.

    Args:
        k: (b, s, h_kv, d), floating.
        num_heads: Query heads h, at least h_kv.

    Returns:
        (b, h_kv) int64; each row adds up to h.

    Raises:
        TypeError: If k is no floating tensor, or ``num_heads`` no integer.
        ValueError: For another shape, or fewer query heads than kv heads.

    Source: Khan et al., "Beyond Uniform Query Distribution: Key-Driven Grouped Query
    Attention" (arXiv 2408.08454), its KDGQA.
    """
    checks.check_tensor('k', k, 'b s h_kv d')
    check_int('num_heads', num_heads)
    kv_heads = k.shape[2]
    if not 1 <= kv_heads <= num_heads:
        raise ValueError(
            f'num_heads must be at least the number of kv heads {kv_heads}, which is '
            f'at least 1, got {num_heads}'
        )
    norm = torch.linalg.vector_norm(k, dim=(1, 3), dtype=torch.float64)
    total = norm.sum(dim=1, keepdim=True)
    # Keys that are all zero weigh the same.
    share = torch.where(total > 0, norm / total, 1 / kv_heads)
    quota = share * (num_heads - kv_heads)
    # Shares that are equal are so to the last digit but one.
    whole = (quota + 1e-9).floor()
    left = (num_heads - kv_heads) - whole.sum(dim=1, keepdim=True)
    place = (quota - whole).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return 1 + whole.long() + (place < left).long()


def key_driven_gqa(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Grouped-query attention whose kv heads have as many query heads as they deserve.

    Query heads are given to the kv heads in order, in the numbers of
    :func:`key_driven_allocation`, for each sample on its own. Where all keys have the
    same norm this is grouped-query attention. The numbers have no gradient, attention
    has one. Keys and values are copied for every query head.

    Args:
        q: (b, n, h, d), float16, bfloat16, float32 or float64.
        k: (b, s, h_kv, d), dtype of q, h % h_kv == 0.
        v: (b, s, h_kv, d), dtype of q.
        dropout: Dropout of the attention weights, in [0, 1). It is always applied:
            pass 0 in evaluation.

    Returns:
        (b, n, h, d), dtype of q, also under autocast.

    Raises:
        TypeError: For a tensor of the wrong dtype, or an option of the wrong type.
        ValueError: For shapes or options that do not fit.

    Source: as :func:`key_driven_allocation`.
    """
    check_inputs(q, k, v, names=('q', 'k', 'v'))
    checks.check_rate('dropout', dropout)
    last = key_driven_allocation(k, q.shape[2]).cumsum(dim=1)
    heads = torch.arange(q.shape[2], device=q.device).expand(len(q), -1)
    chosen = torch.searchsorted(last, heads.contiguous(), right=True)  # (b, h)
    k, v = (_take_heads(x, chosen) for x in (k, v))
    out, _ = attend_grouped(
        q,
        k,
        v,
        attn_mask=None,
        is_causal=False,
        dropout=dropout,
        scale=q.shape[3] ** -0.5,
        need_weights=False,
        average_attn_weights=False,
    )
    return out


def _take_heads(x: Tensor, chosen: Tensor) -> Tensor:
    """(b, s, h_kv, d) and (b, h) -> (b, s, h, d)."""
    index = chosen[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)
