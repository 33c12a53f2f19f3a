"""The published name and order of arguments of deform_sdpa."""

import pytest
import torch
from golden import assert_close, load_golden

from deform_gqa.ops import deform_sdpa_triton


@pytest.mark.parametrize('name', ['deform_sdpa_1view', 'deform_sdpa_2views'])
def test_published_call(name):
    config, arrays = load_golden(name)
    inputs = [arrays[n].clone().requires_grad_() for n in ('q', 'k', 'v', 'coords')]
    out = deform_sdpa_triton(
        *inputs, config['width'], config['height'], config['sm_scale']
    )
    assert_close('y', out, arrays['y'])
    out.backward(arrays['gy'])
    for n, x in zip(('q', 'k', 'v', 'coords'), inputs, strict=True):
        assert_close(n, x.grad, arrays[f'grad_{n}'])


def test_width_comes_before_height():
    q, maps = torch.rand(1, 1, 1, 2, 4), torch.rand(1, 1, 1, 12, 4)
    coords = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 1, 1, 2)
    out = deform_sdpa_triton(q, maps, maps, coords, 4, 3, 1.0)
    torch.testing.assert_close(out[0, 0, 0], maps[0, 0, 0, [3, 8]])


def test_coordinates_of_half_precision():
    q, maps = torch.rand(1, 1, 1, 2, 4).half(), torch.rand(1, 1, 1, 12, 4).half()
    coords = torch.rand(1, 1, 2, 1, 3, 2).half()
    out = deform_sdpa_triton(q, maps, maps, coords, 4, 3, 1.0)
    assert out.dtype == torch.float16 and out.isfinite().all()


def test_wrong_arguments():
    q, maps = torch.rand(1, 1, 1, 2, 4), torch.rand(1, 1, 1, 12, 4)
    with pytest.raises(TypeError, match=r'q must be a torch\.Tensor, got list'):
        deform_sdpa_triton([], maps, maps, torch.rand(1, 1, 2, 1, 3, 2), 4, 3, 1.0)
    with pytest.raises(ValueError, match=r'coords must have shape \(B, Vq, N, V, P, 2'):
        deform_sdpa_triton(q, maps, maps, torch.rand(1, 2, 1, 3, 2), 4, 3, 1.0)
    with pytest.raises(ValueError, match='does not hold the 12 pixels of k and v'):
        deform_sdpa_triton(q, maps, maps, torch.rand(1, 1, 2, 1, 3, 2), 4, 4, 1.0)
