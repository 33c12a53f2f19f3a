"""Bilinear sampling by gathers is torch's grid_sample."""

import pytest
import torch
import torch.nn.functional as F

from deform_gqa.export import GatherSampling, sample_by_gather


@pytest.mark.parametrize('align_corners', [True, False])
@pytest.mark.parametrize('size', [(5, 7), (1, 3)])
def test_equals_grid_sample(align_corners, size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    grid = torch.randn(2, 4, 6, 2, dtype=torch.float64) * 1.5  # some are outside
    expected = F.grid_sample(x, grid, align_corners=align_corners)
    sampled = sample_by_gather(x, grid, align_corners=align_corners)
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-12)


def test_mode_takes_the_place_of_grid_sample():
    x, grid = torch.randn(1, 2, 4, 4), torch.rand(1, 3, 3, 2)
    with torch.profiler.profile() as profile, GatherSampling():
        F.grid_sample(x, grid, align_corners=True)
    names = {event.name for event in profile.events()}
    assert 'aten::gather' in names
    assert not any('grid_sampler' in name for name in names)


@pytest.mark.parametrize(
    ('x', 'options'),
    [
        (torch.zeros(1, 1, 2, 2), dict(mode='nearest')),
        (torch.zeros(1, 1, 2, 2), dict(padding_mode='border')),
        (torch.zeros(1, 1, 2, 2, 2), {}),
    ],
)
def test_refuses_what_it_does_not_compute(x, options):
    with pytest.raises(ValueError, match='stands for bilinear sampling of maps'):
        sample_by_gather(x, torch.zeros(1, 1, 1, 2), **options)
