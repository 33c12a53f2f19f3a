"""What the host side of the Triton kernels does before a launch."""

from unittest import mock

import pytest
import torch

pytest.importorskip('triton')

from deform_gqa.ops.common.backends import OPS, implementation
from deform_gqa.ops.common.triton_host import layout, vector


@pytest.mark.parametrize('direction', ['forward', 'backward'])
@pytest.mark.parametrize('op', [op for op, modules in OPS.items() if modules.triton])
def test_launches_are_on_the_device_of_the_tensors(op, direction):
    """Triton itself launches on the current device, whatever the tensors are on."""

    class Stop(Exception):
        pass

    first = torch.empty(0)
    with (
        mock.patch.object(torch.cuda, 'device_of', side_effect=Stop) as device_of,
        pytest.raises(Stop),
    ):
        implementation(op, 'triton', f'{op}_{direction}')(first)
    device_of.assert_called_once_with(first)


@pytest.mark.parametrize(
    ('shape', 'dtype', 'expected'),
    [
        ((1, 2, 5, 32), torch.float16, 1),  # Triton sees that itself
        ((1, 2, 5, 24), torch.bfloat16, 8),
        ((1, 2, 5, 24), torch.float32, 4),
        ((1, 2, 5, 20), torch.float16, 4),
        ((1, 2, 5, 13), torch.float16, 1),
    ],
)
def test_vector(shape, dtype, expected):
    x = layout(torch.empty(shape, dtype=dtype))
    assert vector(x) == vector(x, x) == expected


def test_no_vectors_along_other_dimensions():
    x = torch.empty(1, 2, 32, 40, dtype=torch.float16)
    transposed, cut, expanded = map(
        layout, (x.transpose(2, 3), x[..., :24], x[:, :1].expand(-1, 2, -1, -1))
    )
    assert vector(transposed) == vector(layout(x), transposed) == 1
    assert vector(cut) == vector(expanded) == 8
