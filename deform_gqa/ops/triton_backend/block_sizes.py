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
# code: the largest tiles without spills, also where positions may be out of range
# (tools/kernel_report.py prints them).
_TABLE = {
    ('deform_attn_fwd', 2, True): {
        32: BlockSizes(256, 64, 8, 2),
        64: BlockSizes(256, 64, 8, 1),
        128: BlockSizes(128, 64, 8, 1),
        256: BlockSizes(64, 64, 8, 1),
    },
    ('deform_attn_fwd', 2, False): {
        32: BlockSizes(256, 64, 8, 2),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(64, 64, 8, 1),
    },
    ('deform_attn_dq', 2, True): {
        32: BlockSizes(256, 32, 8, 2),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 64, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dq', 2, False): {
        32: BlockSizes(256, 32, 8, 2),
        64: BlockSizes(256, 16, 8, 2),
        128: BlockSizes(64, 64, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dkdv', 2, True): {
        32: BlockSizes(256, 32, 8, 1),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dbias', 2, True): {
        32: BlockSizes(256, 16, 8, 1),
        64: BlockSizes(256, 16, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(128, 16, 8, 1),
    },
    ('deform_attn_dkdv_dbias', 2, True): {
        32: BlockSizes(256, 32, 8, 1),
        64: BlockSizes(256, 16, 8, 1),
    },
    ('deform_attn_dkdv', 2, False): {
        32: BlockSizes(256, 32, 8, 1),
        64: BlockSizes(256, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(64, 32, 8, 1),
    },
    ('deform_attn_dbias', 2, False): {
        32: BlockSizes(256, 16, 8, 1),
        64: BlockSizes(256, 16, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_dkdv_dbias', 2, False): {
        32: BlockSizes(256, 16, 8, 1),
        64: BlockSizes(256, 16, 8, 1),
    },
    ('deform_attn_fwd', 4, True): {
        32: BlockSizes(128, 32, 8, 1),
        64: BlockSizes(128, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(32, 16, 8, 1),
    },
    ('deform_attn_fwd', 4, False): {
        16: BlockSizes(128, 16, 8, 1),
        32: BlockSizes(128, 32, 8, 1),
        64: BlockSizes(128, 32, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(64, 16, 8, 1),
    },
    ('deform_attn_dq', 4, True): {
        32: BlockSizes(128, 32, 8, 1),
        64: BlockSizes(128, 32, 8, 1),
        128: BlockSizes(64, 32, 8, 1),
        256: BlockSizes(32, 16, 8, 1),
    },
    ('deform_attn_dq', 4, False): {
        32: BlockSizes(128, 16, 8, 1),
        64: BlockSizes(128, 16, 8, 1),
        128: BlockSizes(64, 16, 8, 1),
        256: BlockSizes(32, 16, 8, 1),
    },
    ('deform_attn_dkdv', 4, True): {
        32: BlockSizes(64, 16, 4, 1),
        64: BlockSizes(64, 16, 8, 1),
        128: BlockSizes(32, 32, 8, 1),
        256: BlockSizes(16, 16, 8, 1),
    },
    ('deform_attn_dbias', 4, True): {
        32: BlockSizes(128, 16, 8, 1),
        64: BlockSizes(128, 16, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(128, 16, 8, 1),
    },
    ('deform_attn_dkdv', 4, False): {
        32: BlockSizes(64, 16, 4, 1),
        64: BlockSizes(64, 16, 8, 1),
        128: BlockSizes(32, 32, 8, 1),
        256: BlockSizes(16, 16, 8, 1),
    },
    ('deform_attn_dbias', 4, False): {
        32: BlockSizes(128, 16, 8, 1),
        64: BlockSizes(128, 16, 8, 1),
        128: BlockSizes(128, 16, 8, 1),
        256: BlockSizes(128, 16, 8, 1),
    },
    ('neighborhood_fwd', 2, True): {
        32: BlockSizes(64, 64, 4, 1),
        64: BlockSizes(64, 64, 4, 1),
        128: BlockSizes(64, 64, 4, 1),
        256: BlockSizes(64, 64, 4, 1),
    },
    ('neighborhood_dq', 2, True): {
        32: BlockSizes(64, 64, 4, 1),
        64: BlockSizes(64, 64, 4, 1),
        128: BlockSizes(64, 32, 4, 1),
        256: BlockSizes(64, 32, 4, 1),
    },
    ('neighborhood_dkdv', 2, True): {
        32: BlockSizes(64, 64, 4, 1),
        64: BlockSizes(32, 64, 4, 1),
        128: BlockSizes(16, 32, 4, 1),
        256: BlockSizes(16, 64, 4, 1),
    },
    ('neighborhood_fwd', 2, False): {
        32: BlockSizes(64, 64, 4, 1),
        64: BlockSizes(64, 64, 4, 1),
        128: BlockSizes(64, 32, 4, 1),
        256: BlockSizes(64, 64, 4, 1),
    },
    ('neighborhood_dq', 2, False): {
        32: BlockSizes(64, 64, 4, 1),
        64: BlockSizes(64, 32, 4, 1),
        128: BlockSizes(64, 32, 4, 1),
        256: BlockSizes(64, 64, 4, 1),
    },
    ('neighborhood_dkdv', 2, False): {
        32: BlockSizes(32, 64, 4, 1),
        64: BlockSizes(16, 64, 4, 1),
        128: BlockSizes(16, 32, 4, 1),
        256: BlockSizes(16, 64, 4, 1),
    },
    ('neighborhood_fwd', 4, True): {
        32: BlockSizes(64, 32, 4, 1),
        64: BlockSizes(128, 32, 8, 1),
        128: BlockSizes(128, 32, 8, 1),
        256: BlockSizes(128, 32, 8, 1),
    },
    ('neighborhood_dq', 4, True): {
        32: BlockSizes(64, 32, 4, 1),
        64: BlockSizes(64, 64, 4, 1),
        128: BlockSizes(64, 64, 4, 1),
        256: BlockSizes(64, 64, 4, 1),
    },
    ('neighborhood_dkdv', 4, True): {
        32: BlockSizes(16, 64, 4, 1),
        64: BlockSizes(32, 64, 4, 1),
        128: BlockSizes(32, 64, 4, 1),
        256: BlockSizes(32, 64, 4, 1),
    },
    ('neighborhood_fwd', 4, False): {
        32: BlockSizes(64, 32, 4, 1),
        64: BlockSizes(64, 32, 4, 1),
        128: BlockSizes(64, 32, 4, 1),
        256: BlockSizes(64, 32, 4, 1),
    },
    ('neighborhood_dq', 4, False): {
        32: BlockSizes(64, 32, 4, 1),
        64: BlockSizes(64, 32, 4, 1),
        128: BlockSizes(64, 32, 4, 1),
        256: BlockSizes(64, 32, 4, 1),
    },
    ('neighborhood_dkdv', 4, False): {
        32: BlockSizes(16, 32, 4, 1),
        64: BlockSizes(16, 64, 4, 1),
        128: BlockSizes(16, 64, 4, 1),
        256: BlockSizes(16, 64, 4, 1),
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


def dot_part(head_dim: int, dtype: torch.dtype) -> int:
    """Dimensions of q, k, v and grad_out in one product of the deform_attn kernels.

    More would not fit into registers.
    """
    padded = pad_head_dim(head_dim)
    if dtype.itemsize == 4:
        return min(padded, 32)
    return padded if padded <= 128 else 64


def fuses_bias_gradient(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether one deform_attn kernel fits the gradients of k, v, pos and table."""
    return dtype.itemsize == 2 and head_dim <= 64


def block_sizes(op: str, head_dim: int, dtype: torch.dtype, arch: int) -> BlockSizes:
    """Sizes for one kernel.

    Args:
        op: 'deform_attn_fwd', 'deform_attn_dq', 'deform_attn_dkdv' (gradients of k and
            v), 'deform_attn_dbias' (of pos and the table), 'deform_attn_dkdv_dbias'
            (all four, of 16-bit inputs with D <= 64); 'neighborhood_fwd',
            'neighborhood_dq' or 'neighborhood_dkdv'.
        head_dim: D, 8 to 256.
        dtype: dtype of q.
        arch: Compute capability as 80 or 90.
    """
    padded = pad_head_dim(head_dim)
    tuned = _overrides().get(override_key(op, padded, dtype, arch))
    if tuned is not None:
        return tuned
    by_head_dim = _TABLE[op, dtype.itemsize, arch >= 90]
    return by_head_dim.get(padded) or by_head_dim[max(32, padded)]
