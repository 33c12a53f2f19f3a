"""Which tiles an architecture gets; what they compile to is tested in test_inspect."""

import itertools

import pytest
import torch

from deform_gqa.ops.common.block_sizes import (
    BlockSizes,
    generation,
    has_small_shared_memory,
    tabled_sizes,
)
from deform_gqa.ops.deform_attn import block_sizes as deform_attn
from deform_gqa.ops.deform_sdpa import block_sizes as deform_sdpa
from deform_gqa.ops.neighborhood_attn import block_sizes as neighborhood_attn

ARCHS = (80, 86, 87, 89, 90, 100, 103, 120, 121)
HEAD_DIMS = (8, 24, 32, 64, 100, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_generations():
    found = [generation(arch) for arch in ARCHS]
    assert found == [80, 80, 80, 80, 90, 100, 100, 80, 80]


def test_devices_with_less_shared_memory():
    assert [x for x in ARCHS if has_small_shared_memory(x)] == [86, 89, 120, 121]


def test_a_later_generation_names_only_what_differs():
    first, second, other = (BlockSizes(queries, 32, 4, 1) for queries in (16, 32, 64))
    table = {
        ('kernel', 2, 80): {32: first, 64: first},
        ('kernel', 2, 90): {32: second, 64: second},
        ('kernel', 2, 100): {64: other},
    }

    def sizes(arch, head_dim):
        return tabled_sizes(table, 'kernel', head_dim, torch.float16, arch)

    assert [sizes(arch, 40) for arch in (86, 90, 100, 120)] == [
        first,
        second,
        other,
        first,
    ]
    assert sizes(100, 32) == second and sizes(100, 16) == second


@pytest.mark.parametrize('op', [deform_attn, neighborhood_attn])
def test_every_kernel_has_sizes_for_every_architecture(op):
    kernels = {(kernel, itemsize) for kernel, itemsize, _ in op.TABLE}
    for (kernel, itemsize), arch in itertools.product(kernels, ARCHS):
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        for head_dim in HEAD_DIMS:
            if kernel == 'deform_attn_dkdv_dbias' and head_dim > 64:
                continue  # two kernels
            sizes = op.block_sizes(kernel, head_dim, dtype, arch)
            assert min(sizes.queries, sizes.keys) >= 8 and sizes.warps >= 4


def test_deform_attn_on_devices_with_less_shared_memory():
    for kernel, head_dim in itertools.product(
        ('deform_attn_fwd', 'deform_attn_dq'), HEAD_DIMS
    ):
        for dtype in DTYPES:
            ask = kernel, head_dim, dtype
            small, large = (deform_attn.block_sizes(*ask, arch) for arch in (86, 80))
            assert small.keys == min(large.keys, 32) and small.stages == 1
            assert (small.queries, small.warps) == (large.queries, large.warps)
            assert small == deform_attn.block_sizes(*ask, 89)
            assert small == deform_attn.block_sizes(*ask, 120)


@pytest.mark.parametrize('arch', ARCHS)
def test_deform_sdpa_spans_all_lanes(arch):
    kernels = ('deform_sdpa_fwd', 'deform_sdpa_bwd', 'deform_sdpa_bwd_fixed')
    for kernel, head_dim, dtype, sharing in itertools.product(
        kernels, HEAD_DIMS, DTYPES, (1, 2, 3, 8, 32)
    ):
        tile = deform_sdpa.block_sizes(kernel, head_dim, dtype, arch, sharing)
        assert 1 <= tile.heads <= 8 and tile.queries >= 1
        assert tile.atomic == 1 or arch >= 90
