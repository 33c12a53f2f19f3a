"""deform_sample of maps and gradients far from 1, and of a single last position."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shifted_cases import ATOL, Load, check_scaled, determinism, loads
from torch import Tensor

from deform_gqa.ops import deform_sample


@dataclasses.dataclass
class Case:
    """Shape of one call of deform_sample; notation of ``ops/__init__.py``."""

    groups: int
    channels: int  # of a group
    grid_size: tuple[int, int]
    keys: int
    scale: int  # of the map's values
    seed: int

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """x, and pos that may lie off the map, but on no pixel's centre."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = 2, self.groups * self.channels, *self.grid_size
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * self.scale
        pos = torch.rand(2, self.groups, self.keys, 2, generator=generator) * 2.4 - 1.2
        size = torch.tensor(self.grid_size) - 1
        at = (pos + 1) * size / 2
        pos += 0.01 * ((at - at.round()).abs() < 1e-3)
        pos = pos.double() if dtype == torch.float64 else pos
        return [x.to(dtype).requires_grad_(), pos.requires_grad_()]


@st.composite
def cases(draw) -> Case:
    return Case(
        groups=draw(st.integers(1, 2)),
        channels=draw(st.sampled_from([1, 3, 16])),
        grid_size=draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        keys=32 * draw(st.integers(0, 1)) + draw(st.integers(1, 31)),
        scale=2 ** draw(st.integers(-8, 8)),
        seed=draw(st.integers(0, 2**16)),
    )


def check(case: Case, backend: str, dtype: torch.dtype, load: Load) -> None:
    check_scaled(
        functools.partial(deform_sample, backend=backend),
        functools.partial(deform_sample, backend='naive'),
        case.inputs(dtype),
        load,
    )


@pytest.mark.parametrize('dtype', list(ATOL))
def test_torch(dtype):
    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(cases(), loads())
    def check_drawn(case, load):
        check(case, 'torch', dtype, load)

    check_drawn()


@pytest.mark.interpret
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_triton(dtype):
    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(cases(), loads())
    def check_drawn(case, load):
        check(case, 'triton', dtype, load)

    check_drawn()


@pytest.mark.interpret
@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_infinities_show_in_fixed_point_sums(value):
    """Or a GradScaler would not notice."""
    x, pos = Case(1, 2, (3, 4), 5, 1, 0).inputs(torch.float32)
    out = deform_sample(x, pos, backend='triton')
    grad = torch.ones_like(out)
    grad[0, 0, 0] = value
    with determinism(True):
        grad_x, _ = torch.autograd.grad(out, (x, pos), grad)
    assert not grad_x.isfinite().any()


@pytest.mark.interpret
def test_infinite_pixels_leave_the_gradient_of_others():
    """In fixed point too: the gradient of x does not depend on x."""
    x, pos = Case(1, 2, (3, 4), 5, 1, 0).inputs(torch.float32)
    out = deform_sample(x, pos, backend='triton')
    with determinism(True):
        (expected,) = torch.autograd.grad(out, x, torch.ones_like(out))
        with torch.no_grad():
            x[0, 0, 0, 0] = float('inf')
        out = deform_sample(x, pos, backend='triton')
        (actual,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(actual, expected)


@pytest.mark.interpret
def test_fixed_point_holds_the_sum_of_all_samples():
    """Of one sign, on one pixel."""
    x = torch.zeros(1, 1, 3, 3, requires_grad=True)
    pos = torch.zeros(1, 1, 100, 2)
    with determinism(True):
        deform_sample(x, pos, backend='triton').backward(torch.full((1, 1, 100), 7.0))
    assert x.grad[0, 0, 1, 1] == 700
    assert x.grad.sum() == 700
