"""Block sizes of the kernels: pure tables, so that nothing is tuned at run time.

Each op with kernels has a ``block_sizes.py``, whose function of that name alone says
what a kernel gets: (kernel, head dimension, dtype, architecture, features) -> sizes.

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


# (kernel, bytes of the dtype, generation) -> sizes by padded head dimension. Generation
# 100 names only what differs from 90.
Table = dict[tuple[str, int, int], dict[int, BlockSizes]]


@functools.cache
def _overrides() -> dict[str, BlockSizes]:
    if not OVERRIDES.is_file():
        return {}
    entries = json.loads(OVERRIDES.read_text())
    return {key: BlockSizes(**value) for key, value in entries.items()}


def override_key(kernel: str, head_dim: int, dtype: torch.dtype, arch: int) -> str:
    return f'{kernel}/{head_dim}/{str(dtype).removeprefix("torch.")}/sm_{arch}'


def pad_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a tile holds."""
    return max(16, 1 << (head_dim - 1).bit_length())


def dot_part(head_dim: int, dtype: torch.dtype) -> int:
    """Dimensions of q, k, v and grad_out in one product of the attention kernels.

    More would not fit into registers.
    """
    padded = pad_head_dim(head_dim)
    if dtype.itemsize == 4:
        return min(padded, 32)
    return padded if padded <= 128 else 64


def generation(arch: int) -> int:
    """80, 90 or 100: whose tensor cores an architecture has.

    Those of sm_120 (GeForce) are programmed as Ampere's.
    """
    return 80 if arch < 90 or arch >= 120 else 90 if arch < 100 else 100


def has_small_shared_memory(arch: int) -> bool:
    """Whether a program may use 99 KiB, not 163 (sm_80) or 227."""
    return arch in (86, 89) or arch >= 120


def tabled_sizes(
    table: Table, kernel: str, head_dim: int, dtype: torch.dtype, arch: int
) -> BlockSizes:
    """Sizes of a kernel without special features: measured here, or built in.

    Args:
        table: Of the kernel's op.
        kernel: A name in it.
        head_dim: D, 8 to 256.
        dtype: dtype of q.
        arch: Compute capability as 80 or 90.
    """
    padded = pad_head_dim(head_dim)
    tuned = _overrides().get(override_key(kernel, padded, dtype, arch))
    if tuned is not None:
        return tuned
    of = generation(arch)
    by_head_dim = table[kernel, dtype.itemsize, min(of, 90)]
    by_head_dim = by_head_dim | table.get((kernel, dtype.itemsize, of), {})
    return by_head_dim.get(padded) or by_head_dim[max(32, padded)]
