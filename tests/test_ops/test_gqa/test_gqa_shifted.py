"""scaled_dot_product_gqa where logits are far from 0, with and without masks."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shifted_cases import ATOL, Load, check_load, loads

from deform_gqa.ops import scaled_dot_product_gqa


def attend(*inputs, need_weights=False, **options):
    return scaled_dot_product_gqa(*inputs, need_weights=need_weights, **options)[0]


def draw_inputs(num_queries, num_keys, kv_heads, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, num_queries, 4, 8), *[(2, num_keys, kv_heads, 8)] * 2]
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in shapes
    ]


def draw_mask(num_queries, num_keys, seed):
    """Some queries have no keys."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 4, num_queries, num_keys, generator=generator) > 0.6
    mask[0, :, 0] = False
    return mask


@pytest.mark.parametrize('dtype', list(ATOL))
def test_fused_equals_materialised(dtype):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(
        st.integers(1, 20),
        st.integers(1, 40),
        st.sampled_from([1, 2, 4]),
        st.sampled_from(['all', 'causal', 'masked']),
        st.integers(0, 2**16),
        loads(),
    )
    def check_drawn(num_queries, num_keys, kv_heads, kind, seed, load):
        if dtype == torch.float16:  # torch adds the gradients of query heads in it
            load = dataclasses.replace(load, loss_scale=min(load.loss_scale, 4096))
        options = {'is_causal': kind == 'causal'}
        if kind == 'masked':
            options['mask'] = draw_mask(num_queries, num_keys, seed)
        check_load(
            functools.partial(attend, **options),
            functools.partial(attend, need_weights=True, **options),
            draw_inputs(num_queries, num_keys, kv_heads, seed, dtype),
            load,
        )

    check_drawn()


@pytest.mark.parametrize('shift', [-300, 300])
@pytest.mark.parametrize('dtype', list(ATOL))
def test_materialised_stays_finite(dtype, shift):
    def finite(*inputs):
        out = attend(*inputs, mask=draw_mask(5, 7, 0), need_weights=True)
        assert out.isfinite().all()
        return out

    load = Load(shift, loss_scale=1, deterministic=False)
    check_load(finite, finite, draw_inputs(5, 7, 2, 0, dtype), load)
