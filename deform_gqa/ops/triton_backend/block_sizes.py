"""Block sizes of the kernels: a pure table, so that nothing is tuned at run time.

``tools/tune_kernels.py`` measures candidates on the machine it runs on and rewrites
the file ``block_sizes.json`` beside this one, which overrides the built-in table.
"""

import dataclasses
import functools
import json
import pathlib

import torch

OVERRIDES = pathlib.Path(__file__).with_name('block_sizes.json')


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Attributes:
    queries: Most queries of a tile (a patch of the map), a power of two.
    keys: Keys of a tile, a power of two.
    warps: num_warps, a power of two.
    stages: num_stages of the loop's loads.
    """

    queries: int
    keys: int
    warps: int
    stages: int


# (op, bytes of the dtype, Hopper or later) -> sizes by padded head dimension. Chosen
# ahead of time by instructions a pair, registers and shared memory of the compiled
# code: the largest tiles without spills (tools/kernel_report.py prints them).
_TABLE = {
    ('deform_attn_fwd', 2, True): {
        32: BlockSizes(256, 64, 8, 2),
        64: BlockSizes(256, 64, 8, 2),
        128: BlockSizes(128, 32, 8, 2),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_fwd', 2, False): {
        32: BlockSizes(256, 64, 8, 2),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dq', 2, True): {
        32: BlockSizes(256, 32, 8, 2),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dq', 2, False): {
        32: BlockSizes(256, 32, 8, 2),
        64: BlockSizes(256, 16, 8, 2),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_dkdv', 2, True): {
        32: BlockSizes(256, 32, 8, 1),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_dkdv', 2, False): {
        32: BlockSizes(256, 32, 8, 1),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_fwd', 4, True): {
        32: BlockSizes(128, 32, 8, 1),
        64: BlockSizes(128, 32, 8, 1),
        128: BlockSizes(64, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_fwd', 4, False): {
        32: BlockSizes(128, 32, 8, 1),
        64: BlockSizes(128, 16, 8, 1),
        128: BlockSizes(64, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_dq', 4, True): {
        32: BlockSizes(128, 32, 8, 1),
        64: BlockSizes(128, 16, 8, 1),
        128: BlockSizes(64, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_dq', 4, False): {
        32: BlockSizes(128, 16, 8, 1),
        64: BlockSizes(64, 16, 8, 1),
        128: BlockSizes(64, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_dkdv', 4, True): {
        32: BlockSizes(128, 16, 8, 1),
        64: BlockSizes(64, 16, 8, 1),
        128: BlockSizes(64, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_dkdv', 4, False): {
        32: BlockSizes(64, 16, 8, 1),
        64: BlockSizes(64, 16, 8, 1),
        128: BlockSizes(64, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
}


@functools.cache
def _overrides() -> dict[str, BlockSizes]:
    if not OVERRIDES.is_file():
        return {}
    entries = json.loads(OVERRIDES.read_text())
    return {key: BlockSizes(**value) for key, value in entries.items()}


def override_key(op: str, head_dim: int, dtype: torch.dtype, arch: int) -> str:
    return f'{op}/{head_dim}/{str(dtype).removeprefix("torch.")}/sm_{arch}'


def pad_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a tile holds."""
    return max(16, 1 << (head_dim - 1).bit_length())


def block_sizes(op: str, head_dim: int, dtype: torch.dtype, arch: int) -> BlockSizes:
    """Sizes for one kernel.

    Args:
        op: 'deform_attn_fwd', 'deform_attn_dq' or 'deform_attn_dkdv'.
        head_dim: D, 8 to 256.
        dtype: dtype of q.
        arch: Compute capability as 80 or 90.
    """
    padded = pad_head_dim(head_dim)
    tuned = _overrides().get(override_key(op, padded, dtype, arch))
    if tuned is not None:
        return tuned
    by_head_dim = _TABLE[op, dtype.itemsize, arch >= 90]
    return by_head_dim[max(32, padded)]
