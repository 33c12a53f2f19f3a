"""Query heads and the kv heads that serve them."""

from torch import Tensor


def repeat_kv(x: Tensor, num_heads: int) -> Tensor:
    """(B, Hkv, S, D) -> (B, Hq, S, D): kv head h // (Hq // Hkv) for query head h."""
    if x.shape[1] == num_heads:
        return x
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)
