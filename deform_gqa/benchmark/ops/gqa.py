"""scaled_dot_product_gqa at a decoding step, as in figure 6 of the GQA paper.

Measured by ``gqa-sweep`` alone: it runs torch's SDPA and has no backends.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from .case import OpCase, Spec

OP = 'scaled_dot_product_gqa'
# T5-XXL of the paper (arXiv 2305.13245): 2048 input tokens, 64 heads of 64.
PAPER_BATCH, CPU_BATCH = 32, 4
KEYS, HEADS, HEAD_DIM = 2048, 64, 64


@dataclasses.dataclass(frozen=True)
class DecodingCase(OpCase):
    """A query a sequence and head reads all keys so far; grid_size is (1, 1)."""

    op: ClassVar[str] = OP

    keys: int

    @property
    def name(self) -> str:
        kv_heads = f'kv{self.num_kv_heads}of{self.num_heads}'
        return f'{OP}/b{self.batch}/s{self.keys}/{kv_heads}'

    @property
    def subject(self) -> str:
        smaller = '' if self.batch == PAPER_BATCH else f' (paper: {PAPER_BATCH})'
        return (
            f'{OP}, decoding: batch {self.batch}{smaller}, {self.num_queries} query on '
            f'{self.keys} keys, {self.num_heads} query heads of {self.head_dim}'
        )

    @property
    def keys_per_query(self) -> int:
        return self.keys

    def input_specs(self, dtype: torch.dtype) -> dict[str, Spec]:
        kv = (self.batch, self.keys, self.num_kv_heads, self.head_dim)
        q = (self.batch, self.num_queries, self.num_heads, self.head_dim)
        return {'q': (q, dtype), 'k': (kv, dtype), 'v': (kv, dtype)}

    def options(self) -> dict[str, Any]:
        return {}

    @classmethod
    def for_sweep(cls, *, batch: int | None, cuda: bool, **_: Any) -> OpCase:
        return cls(
            batch=batch or (PAPER_BATCH if cuda else CPU_BATCH),
            num_heads=HEADS,
            num_kv_heads=HEADS,
            head_dim=HEAD_DIM,
            grid_size=(1, 1),
            keys=KEYS,
        )


def attend(tensors: dict[str, Tensor]) -> Tensor:
    """The output, without the weights."""
    from deform_gqa import ops

    return ops.scaled_dot_product_gqa(*(tensors[name] for name in 'qkv'))[0]
