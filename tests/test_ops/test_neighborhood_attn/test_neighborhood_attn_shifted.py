"""neighborhood_attn where logits are far from 0 and gradients large."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_cases import NeighborhoodCase
from shifted_cases import ATOL, Load, check_load, check_scaled, loads
from triton_cases import tile_sizes

from deform_gqa.ops import neighborhood_attn
from deform_gqa.ops.common.block_sizes import BlockSizes

# The interpreter takes as long for a large tile as for a small one.
SIZES = BlockSizes(queries=128, keys=64, warps=4, stages=1)


@st.composite
def cases(draw, most: int) -> NeighborhoodCase:
    """Maps of at most ``most`` places a side beyond the window."""
    kernel_size = draw(st.sampled_from([3, 5]))
    dilation = draw(st.sampled_from([1, 1, 2]))
    height, width = (
        kernel_size * dilation + draw(st.integers(0, most)) for _ in range(2)
    )
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1)]))
    return NeighborhoodCase(
        batch=1,
        heads=heads,
        kv_heads=kv_heads,
        grid_size=(height, width),
        kernel_size=kernel_size,
        dilation=dilation,
        head_dim=draw(st.sampled_from([8, 13, 32])),
        rpb=draw(st.booleans()),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def check(case: NeighborhoodCase, backend: str, dtype: torch.dtype, load: Load) -> None:
    attend = functools.partial(neighborhood_attn, **case.options())
    check_load(
        functools.partial(attend, backend=backend),
        functools.partial(attend, backend='naive'),
        case.inputs(dtype),
        load,
    )


@pytest.mark.parametrize('dtype', list(ATOL))
def test_torch(dtype):
    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(cases(9), loads())
    def check_drawn(case, load):
        check(case, 'torch', dtype, load)

    check_drawn()


@pytest.mark.interpret
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_triton(dtype):
    @settings(max_examples=4, deadline=None, derandomize=True, database=None)
    @given(cases(4), loads())
    def check_drawn(case, load):
        with tile_sizes(SIZES):
            check(case, 'triton', dtype, load)

    check_drawn()


BACKENDS = ['torch', pytest.param('triton', marks=pytest.mark.interpret)]


@pytest.mark.parametrize('shift', [-300, 300])
@pytest.mark.parametrize('backend', BACKENDS)
def test_shift_in_the_bias(backend, shift):
    """It reaches queries off the map as well, whose q k^T is 0."""
    case = NeighborhoodCase(1, 2, 1, (5, 9), 3, 1, 8, True, False, 0)
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        inputs[3].add_(shift)
    attend = functools.partial(neighborhood_attn, **case.options())
    with tile_sizes(SIZES):
        check_scaled(
            functools.partial(attend, backend=backend),
            functools.partial(attend, backend='naive'),
            inputs,
            Load(shift, loss_scale=1024, deterministic=False),
        )
