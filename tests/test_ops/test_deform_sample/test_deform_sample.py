import pytest
import torch
from torch.testing import assert_close

from deform_gqa.ops import deform_sample


def make(dtype=torch.float64, shape=(2, 6, 5, 7), groups=3, keys=11):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    pos = (
        torch.rand(shape[0], groups, keys, 2, generator=generator).double() * 2.6 - 1.3
    )
    pos = pos if dtype == torch.float64 else pos.float()
    return x.requires_grad_(), pos.requires_grad_()


@pytest.mark.parametrize(
    'shape', [(2, 6, 5, 7), (1, 3, 1, 9), (2, 3, 4, 1), (0, 3, 4, 4)]
)
@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('on_pixels', [False, True])
def test_equals_naive(shape, groups, on_pixels):
    """In values and gradients, also where points are on pixels, as clamped ones are."""
    x, pos = make(shape=shape, groups=groups)
    if on_pixels:
        pos = pos.detach().round().requires_grad_()
    expected = deform_sample(x, pos, backend='naive')
    actual = deform_sample(x, pos, backend='torch')
    assert_close(actual, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, pos), grad)
    for a, e in zip(torch.autograd.grad(actual, (x, pos), grad), wanted, strict=True):
        assert_close(a, e)


def test_pixel_centres_corners_and_outside():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    pos = torch.tensor([[-1, -1], [1, 1], [0, -1], [-1, 1], [1, 3], [-3, 0]])
    out = deform_sample(x, pos.float().reshape(1, 1, 6, 2))
    assert_close(out.flatten(), torch.tensor([0.0, 11, 4, 3, 0, 0]))


def test_groups_sample_their_own_channels():
    x, pos = (t.detach() for t in make())
    out = deform_sample(x, pos)
    for group in range(3):
        part = deform_sample(x[:, 2 * group : 2 * group + 2], pos[:, group : group + 1])
        assert_close(out[:, 2 * group : 2 * group + 2], part)


def test_gradcheck():
    torch.autograd.gradcheck(
        lambda x, pos: deform_sample(x, pos, backend='torch'), make()
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_maps_with_float32_positions(dtype):
    x, pos = make(dtype)
    out = deform_sample(x, pos)
    assert out.dtype == dtype
    exact = deform_sample(x.detach().double(), pos.detach().double())
    assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (lambda x, p: (x[0], p), ValueError, 'x must have shape'),
        (lambda x, p: (x.long(), p), TypeError, 'x must be a floating'),
        (lambda x, p: (x, p[..., :1]), ValueError, 'pos must have shape'),
        (lambda x, p: (x, p.float()), TypeError, 'pos must be torch.float64'),
        (lambda x, p: (x[:, :5], p), ValueError, 'offset groups, got 3'),
        (lambda x, p: (x[:, :, :0], p), ValueError, 'at least 1 x 1'),
        (lambda x, p: (x[:, :0], p), ValueError, r'channels .* got \(2, 0, 5, 7\)'),
        (lambda x, p: (x, p[:1]), ValueError, 'with B = 2'),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        deform_sample(*change(*make()))
