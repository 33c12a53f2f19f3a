"""Launches for more batch entries, groups and heads than a grid's y and z hold."""

import pytest
import torch

pytest.importorskip('triton')

from deform_gqa.inspect.aot import record_launches
from deform_gqa.ops import deform_attn, deform_sample, deform_sdpa, neighborhood_attn
from deform_gqa.ops.common import backends

MANY = 70_000  # beyond 65535, where dimensions y and z of a grid end
OPTIONS = {'grid_size': (1, 1), 'backend': 'triton'}


def zeros(*shape):
    return torch.zeros(shape, requires_grad=True)


def attend(batch, heads):
    q = zeros(batch, heads, 1, 8)
    pos, table = zeros(batch, heads, 1, 2), zeros(heads, 1, 1)
    return deform_attn(q, q, q, pos, table, **OPTIONS)


def sample(batch, groups):
    return deform_sample(
        zeros(batch, groups, 1, 1), zeros(batch, groups, 1, 2), backend='triton'
    )


def attend_samples(batch, heads):
    q = zeros(batch, 1, heads, 1, 8)
    return deform_sdpa(q, q, q, zeros(batch, 1, heads, 1, 1, 1, 2), **OPTIONS)


def attend_neighbors(batch, heads):
    q = zeros(batch, heads, 9, 8)
    options = {**OPTIONS, 'grid_size': (3, 3), 'kernel_size': 3}
    return neighborhood_attn(q, q, q, zeros(heads, 5, 5), **options)


@pytest.mark.parametrize(('batch', 'heads'), [(MANY, 1), (1, MANY)])
@pytest.mark.parametrize('op', [attend, sample, attend_samples, attend_neighbors])
def test_grids(monkeypatch, op, batch, heads):
    monkeypatch.setattr(backends, '_device_reason', lambda device: None)
    with record_launches(90) as launches:
        out = op(batch, heads)
        out.backward(torch.zeros_like(out))
    assert len({launch.name for launch in launches}) >= 2  # forward and backward
    for launch in launches:
        assert all(size <= 65535 for size in launch.grid[1:]), launch.name
        assert launch.grid[0] < 2**31
