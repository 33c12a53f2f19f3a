"""Autocast changes neither the dtype nor the value of what an op returns."""

import functools

import pytest
import torch

from deform_gqa.ops import (
    deform_attn,
    deform_sample,
    deform_sdpa,
    neighborhood_attn,
    scaled_dot_product_gqa,
)
from deform_gqa.ops.common.autocast import without_autocast

GRID_SIZE = (4, 5)


def attend_to_samples(q, k, v, *, bias, backend):
    pos, table = torch.linspace(-1, 1, 40).view(1, 1, 20, 2), torch.ones(2, 7, 9)
    bias = (pos, table.cumsum(2)) if bias else ()
    return deform_attn(q, k, v, *bias, grid_size=GRID_SIZE, backend=backend)


def attend_to_neighbors(q, k, v, *, backend):
    options = dict(grid_size=GRID_SIZE, kernel_size=3, backend=backend)
    return neighborhood_attn(q, k, v, torch.ones(2, 5, 5).cumsum(2), **options)


def attend_to_points(q, k, v, *, backend):
    coords = torch.linspace(0, 1, 120).view(1, 1, 20, 1, 3, 2)
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    return deform_sdpa(q, k, v, coords, grid_size=GRID_SIZE, backend=backend)


def sample(q, k, v, *, backend):
    pos = torch.linspace(-1, 1, 40).view(1, 1, 20, 2)
    return deform_sample(q.view(1, -1, *GRID_SIZE), pos, backend=backend)


def attend_grouped(q, k, v, *, need_weights):
    out, weights = scaled_dot_product_gqa(q, k, v, need_weights=need_weights)
    return weights if need_weights else out


OPS = {
    f'{op.__name__}-{backend}': functools.partial(op, backend=backend)
    for op in (attend_to_neighbors, attend_to_points, sample)
    for backend in ('naive', 'torch', 'auto')
}
for backend in ('naive', 'torch', 'auto'):
    for bias in (True, False):
        OPS[f'attend_to_samples-{backend}-{bias}'] = functools.partial(
            attend_to_samples, bias=bias, backend=backend
        )
for need_weights in (True, False):
    OPS[f'attend_grouped-{need_weights}'] = functools.partial(
        attend_grouped, need_weights=need_weights
    )


@pytest.mark.parametrize('name', OPS)
def test_autocast_does_not_reach_inside(name):
    qkv = torch.randn(3, 1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    expected = OPS[name](*qkv)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = OPS[name](*qkv)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize('name', OPS)
def test_compiles_without_graph_break(name):
    qkv = torch.randn(3, 1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(OPS[name], backend='aot_eager', fullgraph=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = compiled(*qkv)
    torch.testing.assert_close(actual, OPS[name](*qkv))


def test_device_without_autocast():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with without_autocast(torch.device('meta')):
            pass
        qkv = torch.empty(3, 1, 2, 20, 8, device='meta')
        out = deform_attn(*qkv, grid_size=GRID_SIZE, backend='naive')
    assert out.dtype == torch.float32
