"""Maps and tokens split into heads, and put together again."""

from torch import Tensor


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """A map (B, h * D, H, W) -> (B, h, H * W, D); a view if channels come last."""
    return x.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3)


def merge_heads(x: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """(B, h, H * W, D) -> a map (B, h * D, H, W).

    For what the ops return it is a view with channels last: there, the heads of a token
    lie side by side in memory.
    """
    return x.transpose(2, 3).flatten(1, 2).unflatten(2, grid_size)


def split_qkv(
    x: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, N, (Hq + 2 Hkv) * D) -> views q (B, Hq, N, D), k, v (B, Hkv, N, D).

    The split is one of tokens, so that the gradients are joined token by token as well.
    """
    x = x.unflatten(2, (num_heads + 2 * num_kv_heads, -1))
    parts = x.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    return tuple(part.transpose(1, 2) for part in parts)
