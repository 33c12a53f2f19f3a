"""Keys and values of the tokens that a transformer has read."""

import torch
from torch import Tensor, nn


class KVCache:
    """For each attention module, keys and values of all tokens so far.

    They are tensors (B, S, Hkv, D): the Hkv heads that the module makes.
    """

    def __init__(self) -> None:
        self._entries: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Number of tokens S."""
        for key, _ in self._entries.values():
            return key.shape[1]
        return 0

    @property
    def num_bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(x.nbytes for entry in self._entries.values() for x in entry)

    def append(
        self, module: nn.Module, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, with those of new ones (B, L, Hkv, D)."""
        if module in self._entries:
            old_key, old_value = self._entries[module]
            key = torch.cat([old_key, key], dim=1)
            value = torch.cat([old_value, value], dim=1)
        self._entries[module] = key, value
        return key, value
