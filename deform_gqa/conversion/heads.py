"""The heads of an attention module as plain tensors, and what may be done to them."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Projection:
    """A projection, split into heads.

    Args:
        weight: (H, D, C).
        bias: (H, D), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> Tensor:
        """(H, D, C + 1): weight and bias, which acts on a constant input 1.

        Without a bias the last column is zero.
        """
        bias = self.weight.new_zeros(self.weight.shape[:2])
        if self.bias is not None:
            bias = self.bias
        return torch.cat([self.weight, bias.unsqueeze(-1)], dim=-1)

    def with_columns(self, columns: Tensor) -> 'Projection':
        """The projection that has these columns, (H', D, C + 1)."""
        bias = None if self.bias is None else columns[..., -1]
        return Projection(columns[..., :-1], bias)

    def __getitem__(self, heads: Sequence[int]) -> 'Projection':
        index = torch.as_tensor(heads)
        bias = None if self.bias is None else self.bias[index]
        return Projection(self.weight[index], bias)


@dataclasses.dataclass(frozen=True)
class AttentionHeads:
    """The projections of one attention module, in float64 on the CPU.

    Query head h reads kv head h // (Hq / Hkv).

    Args:
        q: Hq heads.
        k: Hkv heads.
        v: Hkv heads.
        out: (Hq, D, Cout), the columns of the output projection that read each head.
        out_bias: (Cout,), or None.
    """

    q: Projection
    k: Projection
    v: Projection
    out: Tensor
    out_bias: Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.k.num_heads

    @property
    def queries_per_kv_head(self) -> int:
        return self.q.num_heads // self.num_kv_heads

    def query_order(self, kv_order: Sequence[int]) -> list[int]:
        """The order of the query heads that goes with an order of the kv heads."""
        share = self.queries_per_kv_head
        return [kv * share + i for kv in kv_order for i in range(share)]

    def reordered(self, kv_order: Sequence[int]) -> 'AttentionHeads':
        """The same attention, with its kv heads and their query heads in this order."""
        queries = self.query_order(kv_order)
        return AttentionHeads(
            self.q[queries],
            self.k[kv_order],
            self.v[kv_order],
            self.out[torch.as_tensor(queries)],
            self.out_bias,
        )


@dataclasses.dataclass(frozen=True)
class Freedom:
    """Which changes of the heads leave the output of a module as it is.

    Args:
        query: What queries may be multiplied by, if keys are multiplied by the inverse
            transpose: 'any' invertible matrix; 'rotary', a rotation in the plane of
            channels i and i + D / 2, for each i; 'none', where something else reads
            the queries.
        value: Whether values may be multiplied by any invertible matrix, and the
            output projection by its inverse.
        key_bias: Whether the key bias cancels in the softmax.
        value_bias: Whether the value bias can move into the bias of the output
            projection, as attention weights sum to 1.
    """

    query: str = 'any'
    value: bool = True
    key_bias: bool = True
    value_bias: bool = True


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of an attention module on calibration data.

    Each is (C + 1, C + 1), the mean of x x^T for x = (input, 1). None stands for the
    identity: all directions of the input count alike.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
