"""The range of sums in 64-bit fixed point."""

import pytest
import torch

from deform_gqa.ops.common.fixed_point import fixed_point_unit, from_fixed_point


@pytest.mark.parametrize('bound', [1e-45, 1e-20, 1.0, 3.0, 65536.0, 1e20, 3e38])
def test_sums_up_to_the_bound_fit(bound):
    unit = fixed_point_unit(torch.tensor(bound))
    largest = bound * unit.double()
    assert largest < 2**62
    # At least the 24 bits of float32 are left, but where the numbers are denormal.
    assert largest > (2**59 if bound > 1e-9 else 2**30) or bound < 1e-38
    sums = largest.to(torch.int64)
    if bound > 1e-20:
        back = from_fixed_point(sums, unit, torch.zeros(1))
        torch.testing.assert_close(back.item(), bound, rtol=1e-7, atol=0)


def test_no_gradient():
    unit = fixed_point_unit(torch.tensor(0.0))
    assert unit.isfinite() and unit > 0
    zero = torch.zeros((), dtype=torch.int64)
    assert from_fixed_point(zero, unit, torch.zeros(0)) == 0


@pytest.mark.parametrize('bound', [float('inf'), float('nan')])
def test_bound_that_is_not_finite(bound):
    unit = fixed_point_unit(torch.tensor(bound))
    assert unit.isnan()
    sums = torch.arange(3)
    assert from_fixed_point(sums, unit, torch.zeros(1)).isnan().all()


@pytest.mark.parametrize('value', [float('inf'), -float('inf'), float('nan')])
def test_witness_that_is_not_finite(value):
    unit = fixed_point_unit(torch.tensor(1.0))
    witness = torch.tensor([1.0, value], dtype=torch.float16)
    assert from_fixed_point(torch.arange(3), unit, witness).isnan().all()
    large = torch.full((9,), 60000.0, dtype=torch.float16)  # whose sum is infinite
    assert from_fixed_point(torch.arange(3), unit, large).isfinite().all()
