"""projects/multiview_deform_attn: the modules and what they are built on."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[2]))

from deform_gqa.models.layers.sampling_points import pixel_centres, ring_offsets
from projects.multiview_deform_attn.multiview_deform_attn import (
    MultiViewDeformableAttention,
    PerQueryDeformableAttention,
)
from projects.multiview_deform_attn.multiview_deform_attn.points import Atlas


def sample(x, coords):
    """x (C, H, W) at (P, 2) in (x, y), [0, 1] -> (C, P)."""
    grid = coords[None, None] * 2 - 1
    return F.grid_sample(x[None], grid, align_corners=True)[0, :, 0]


@pytest.mark.parametrize(
    'sizes', [[(6, 8)], [(6, 8), (3, 4)], [(5, 3), (4, 7), (1, 1)]]
)
def test_atlas_samples_as_the_maps_do(sizes):
    torch.manual_seed(0)
    maps = [torch.randn(2, *size, dtype=torch.float64) for size in sizes]
    coords = [
        (torch.rand(50, 2, dtype=torch.float64) * 2.4 - 0.7).requires_grad_()
        for _ in sizes
    ]
    atlas = Atlas(sizes)
    sheet = atlas.pack(maps)
    assert sheet.shape[1:] == atlas.size
    actual = sample(sheet, atlas.coords(coords))
    expected = torch.cat([sample(x, c) for x, c in zip(maps, coords, strict=True)], 1)
    assert_close(actual, expected)
    weight = torch.randn_like(actual)
    grads = [torch.autograd.grad(y, coords, weight) for y in (actual, expected)]
    assert_close(*grads)


def test_first_offsets_point_in_all_directions():
    offsets = ring_offsets(4, 3)
    assert not offsets[:, 0].any()
    assert_close(offsets[0, 2], torch.tensor([2.0, 0.0]))
    assert_close(offsets[1, 1], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize('kv_heads', [None, 2, 1])
@pytest.mark.parametrize('size', [(5, 7), (1, 4), (1, 1)])
def test_per_query_block(size, kv_heads):
    torch.manual_seed(0)
    block = MODELS.build(
        dict(
            type='PerQueryDeformableAttention',
            dim=16,
            num_heads=4,
            num_kv_heads=kv_heads,
            num_points=3,
            offset_groups=2,
        )
    )
    x = torch.randn(2, 16, *size, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    if min(size) > 1:
        assert block.base_offset.grad.any()
        assert block.conv_offset[-1].weight.grad.any()


def test_per_query_block_sees_only_its_points():
    """One point without offset: a projection of the query's own pixel."""
    block = PerQueryDeformableAttention(8, 2, num_points=1)
    torch.nn.init.zeros_(block.conv_offset[-1].weight)
    x = torch.randn(1, 8, 4, 5)
    value = F.conv2d(x, block.proj_kv.weight[8:], block.proj_kv.bias[8:])
    assert_close(block(x), block.proj_out(value))


def make(**options):
    return MODELS.build(
        dict(type='MultiViewDeformableAttention', dim=16, num_heads=4, **options)
    )


@pytest.mark.parametrize('kv_heads', [None, 2, 1])
def test_multi_view_and_multi_scale(kv_heads):
    torch.manual_seed(0)
    attention = make(num_kv_heads=kv_heads, num_levels=2, num_points=2)
    query = torch.randn(2, 10, 16, requires_grad=True)
    maps = [torch.randn(2, 3, 16, *size) for size in ((6, 8), (3, 4))]
    out = attention(query, maps, torch.rand(2, 10, 3, 2))
    assert out.shape == query.shape
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in attention.parameters())
    assert attention.offsets.weight.grad.any()
    assert attention.level_embed.grad.any()


def test_queries_of_a_map_learn_to_look_sideways():
    """The target of each pixel stands three pixels to its right: offsets find it."""
    torch.manual_seed(0)
    attention = make(num_points=2, offset_groups=1)
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.02)
    centres = pixel_centres((8, 12), torch.zeros(()))[None]
    losses = []
    for _ in range(150):
        x = F.avg_pool2d(torch.randn(2, 16, 10, 14), 3, 1)
        target = F.pad(x, (0, 3))[..., 3:].flatten(2).transpose(1, 2)
        out = attention(x.flatten(2).transpose(1, 2), [x], centres.expand(2, -1, -1))
        losses.append(F.mse_loss(out, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_a_single_view_needs_no_dimension_of_views():
    torch.manual_seed(0)
    attention = make()
    query, x, points = (
        torch.randn(1, 5, 16),
        torch.randn(1, 16, 6, 8),
        torch.rand(1, 5, 2),
    )
    expected = attention(query, [x[:, None]], points[:, :, None])
    assert_close(attention(query, [x], points), expected)


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        ('PerQueryDeformableAttention', dict(offset_groups=3), 'offset_groups=3'),
        ('PerQueryDeformableAttention', dict(num_points=0), 'num_points .* got 0'),
        ('PerQueryDeformableAttention', dict(offset_kernel_size=4), 'got 4'),
        ('PerQueryDeformableAttention', dict(num_kv_heads=3), 'num_kv_heads=3'),
        ('MultiViewDeformableAttention', dict(offset_groups=3), 'offset_groups=3'),
        ('MultiViewDeformableAttention', dict(num_points=0), 'num_points .* got 0'),
        ('MultiViewDeformableAttention', dict(num_levels=0), 'num_levels .* got 0'),
    ],
)
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.get(kind)(dim=16, num_heads=4, **options)


KINDS = ('PerQueryDeformableAttention', 'MultiViewDeformableAttention')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(attn_drop=1.5), ValueError, 'attn_drop .* got 1.5'),
        (dict(proj_drop='0'), TypeError, "proj_drop .* got '0'"),
        (dict(backend='trition'), ValueError, "backend .* got 'trition'"),
        (dict(num_points=2.0), TypeError, 'num_points .* got 2.0'),
        (dict(offset_groups=1.0), TypeError, 'offset_groups .* got 1.0'),
        (dict(offset_groups=True), TypeError, 'offset_groups .* got True'),
        (dict(num_points=True), TypeError, 'num_points .* got True'),
        (dict(proj_drop=False), TypeError, 'proj_drop .* got False'),
    ],
)
def test_bad_shared_options(kind, options, error, message):
    with pytest.raises(error, match=message):
        MODELS.get(kind)(dim=16, num_heads=4, **options)


@pytest.mark.parametrize(
    ('query', 'maps', 'points', 'message'),
    [
        ((5, 16), [(1, 2, 16, 4, 4)], (1, 5, 2, 2), r'query must have .* \(5, 16\)'),
        ((1, 16, 2, 2), [(1, 2, 16, 4, 4)], (1, 5, 2, 2), r'query must .* 16, 2, 2\)'),
        ((1, 5, 16), [(1, 2, 16, 4, 4)] * 2, (1, 5, 2, 2), 'num_levels=1 .* got 2'),
        ((1, 5, 8), [(1, 2, 16, 4, 4)], (1, 5, 2, 2), '16 channels, got 8'),
        ((1, 5, 16), [(1, 2, 8, 4, 4)], (1, 5, 2, 2), r'maps\[0\] must have shape'),
        ((1, 5, 16), [(1, 2, 16, 4, 4)], (1, 5, 3, 2), 'reference_points must have'),
    ],
)
def test_bad_inputs(query, maps, points, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(query), [torch.zeros(m) for m in maps], torch.zeros(points))


def test_classes_are_registered():
    assert MODELS.get('MultiViewDeformableAttention') is MultiViewDeformableAttention
    assert MODELS.get('PerQueryDeformableAttention') is PerQueryDeformableAttention
