"""What the attention modules have in common."""

from torch import nn

from deform_gqa.checks import check_int, check_rate
from deform_gqa.ops.common.backends import check_backend


class BaseAttention(nn.Module):
    """Base class of attention modules: checks and stores heads, drop rates and backend.

    To stand for a block letter of the DAT backbone, a subclass is registered in MODELS
    and its ``forward`` maps (B, C, H, W) to (B, C, H, W) for any H and W. The backbone
    passes it ``dim``, ``num_heads`` and those of the other arguments below that its
    signature names, along with the options that the config gives. Norm, residual sum
    and stochastic depth are the backbone's; the output projection, with ``proj_drop``
    after it, is the module's.

    Args:
        dim: Number of channels C; a multiple of ``num_heads``.
        num_heads: Query heads Hq.
        num_kv_heads: Key/value heads Hkv that divide ``num_heads``; None for
            ``num_heads``.
        attn_drop: Dropout of the attention weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).
        backend: Backend of the ops of :mod:`deform_gqa.ops` that the module calls.
        head_dim: Channels D of one head; None for ``dim // num_heads``. If given,
            ``dim`` need not be a multiple of ``num_heads``.

    Attributes:
        head_dim: Channels D of one head.
        kv_dim: Channels of the keys, and of the values: Hkv * D.
        dropout_p: Dropout of the attention weights in the current mode: ``attn_drop``
            in training, else 0.

    Raises:
        TypeError: For an option of the wrong type.
        ValueError: For counts that do not divide, a rate out of range, or an unknown
            backend.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = 'auto',
        head_dim: int | None = None,
    ):
        super().__init__()
        heads_dim = dim
        if head_dim is not None:
            check_int('dim', dim, 1)
            check_int('num_heads', num_heads, 1)
            check_int('head_dim', head_dim, 1)
            heads_dim = num_heads * head_dim
        self.num_kv_heads = resolve_kv_heads(heads_dim, num_heads, num_kv_heads)
        check_rate('attn_drop', attn_drop)
        check_rate('proj_drop', proj_drop)
        check_backend(backend)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = heads_dim // num_heads
        self.kv_dim = self.head_dim * self.num_kv_heads
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self.backend = backend

    @property
    def dropout_p(self) -> float:
        return self.attn_drop if self.training else 0.0


def resolve_kv_heads(dim: int, num_heads: int, num_kv_heads: int | None) -> int:
    """The number of kv heads; ``num_heads`` where None is given.

    Raises:
        TypeError: If one of the counts is not an integer.
        ValueError: If ``dim`` is not a multiple of ``num_heads``, or ``num_heads`` not
            one of ``num_kv_heads``.
    """
    check_int('dim', dim, 1)
    check_int('num_heads', num_heads, 1)
    if dim % num_heads:
        raise ValueError(
            f'dim must be a multiple of num_heads, got dim={dim}, '
            f'num_heads={num_heads}; possible are {_divisors(dim)}'
        )
    if num_kv_heads is None:
        return num_heads
    check_int('num_kv_heads', num_kv_heads, 1)
    if num_heads % num_kv_heads:
        raise ValueError(
            f'num_heads must be a multiple of num_kv_heads, got num_heads={num_heads}, '
            f'num_kv_heads={num_kv_heads}; possible are {_divisors(num_heads)}'
        )
    return num_kv_heads


def check_offset_groups(num_heads: int, offset_groups: int) -> None:
    """All offset groups have the same number of query heads, at least one.

    Raises:
        TypeError: If ``offset_groups`` is not an integer.
        ValueError: If it does not divide ``num_heads``.
    """
    check_int('offset_groups', offset_groups, 1)
    if num_heads % offset_groups:
        raise ValueError(
            f'num_heads must be a multiple of offset_groups, got '
            f'num_heads={num_heads}, offset_groups={offset_groups}; possible are '
            f'{_divisors(num_heads)}'
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
