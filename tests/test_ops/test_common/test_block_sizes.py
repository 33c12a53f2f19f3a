"""Which tiles an architecture gets; what they compile to is tested in test_inspect."""

import itertools

import pytest
import torch

from deform_gqa.ops.common.block_sizes import (
    BlockSizes,
    dot_part,
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


def test_the_least_dimension_may_have_sizes_of_its_own():
    own, other = BlockSizes(16, 16, 4, 1), BlockSizes(32, 32, 4, 1)
    table = {('kernel', 4, 80): {16: own, 32: other}}
    sizes = [tabled_sizes(table, 'kernel', dim, torch.float32, 80) for dim in (8, 32)]
    assert sizes == [own, other]


def test_dropout_takes_room():
    """Random numbers need registers: half as many keys, or fewer queries."""
    dropout = deform_attn.Features(dropout=True)
    for (kernel, itemsize, arch), by_dim in deform_attn.TABLE.items():
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        for head_dim in by_dim:
            ask = kernel, head_dim, dtype, arch
            plain = deform_attn.block_sizes(*ask)
            small = deform_attn.block_sizes(*ask, dropout)
            if plain.keys > 16:
                assert (small.queries, small.keys) == (plain.queries, plain.keys // 2)
            else:
                fewer = 32 if plain.queries == 64 else plain.queries
                assert (small.queries, small.keys) == (fewer, plain.keys)
    for (kernel, itemsize, arch), by_dim in neighborhood_attn.TABLE.items():
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        for head_dim in by_dim:
            ask = kernel, head_dim, dtype, arch
            plain = neighborhood_attn.block_sizes(*ask)
            small = neighborhood_attn.block_sizes(*ask, dropout=True)
            assert small.keys == plain.keys // 2 and small.warps == 8
            assert small.queries <= plain.queries


def test_a_product_takes_what_registers_hold():
    assert [dot_part(dim, torch.float32) for dim in (8, 24, 256)] == [16, 32, 32]
    assert [dot_part(dim, torch.float16) for dim in (8, 100, 256)] == [16, 128, 64]


def test_twice_the_keys_without_a_bias():
    def keys(kernel, head_dim, dtype, bias):
        features = deform_attn.Features(bias=bias)
        return deform_attn.block_sizes(kernel, head_dim, dtype, 90, features).keys

    ask = 'deform_attn_dkdv', 64, torch.float16
    assert keys(*ask, bias=False) == 2 * keys(*ask, bias=True)
    for ask in (
        ('deform_attn_dkdv', 128, torch.float16),
        ('deform_attn_dkdv', 64, torch.float32),
        ('deform_attn_fwd', 64, torch.float16),
    ):
        assert keys(*ask, bias=False) == keys(*ask, bias=True)


def test_two_heads_of_deform_sdpa_at_the_largest_dimension():
    def heads(head_dim, arch):
        ask = 'deform_sdpa_bwd', head_dim, torch.float16, arch
        return deform_sdpa.block_sizes(*ask, 8).heads

    assert [heads(256, arch) for arch in (80, 90, 100)] == [2, 2, 2]
    assert [heads(128, arch) for arch in (80, 90, 100)] == [4, 8, 4]


@pytest.mark.parametrize('op', [deform_attn, neighborhood_attn])
def test_every_kernel_has_sizes_for_every_architecture(op):
    kernels = {(kernel, itemsize) for kernel, itemsize, _ in op.TABLE}
    for (kernel, itemsize), arch in itertools.product(kernels, ARCHS):
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        for head_dim in HEAD_DIMS:
            if kernel == 'deform_attn_dkdv_dbias' and head_dim > 64:
                continue  # two kernels
            if kernel == 'deform_attn_dkdv_dbias_by_warp' and head_dim > 32:
                continue  # the former
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
        # The compiler spills a few where it may choose.
        is_free = tile.heads == 1 and kernel != 'deform_sdpa_bwd_fixed'
        assert tile.options.get('maxnreg') == (None if is_free else 255)
