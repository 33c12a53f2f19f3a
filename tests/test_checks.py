"""Checks of numbers: what passes, and what each error says."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from deform_gqa.checks import (
    check_bool,
    check_int,
    check_number,
    check_rate,
    check_size,
)

NO_INTEGERS = [True, False, 2.0, '2', None, np.float32(2), torch.tensor(2)]
NO_NUMBERS = [True, False, '2', None, 2j, torch.tensor(2.0), np.zeros(1)]


@pytest.mark.parametrize('value', [2, 0, -3, np.int64(2), np.uint8(7)])
def test_integers(value):
    check_int('stride', value)
    check_int('stride', value, -3)
    check_size('window_size', abs(value) + 1)


@pytest.mark.parametrize('value', NO_INTEGERS, ids=repr)
def test_no_integers(value):
    message = f'must be an integer, got .* of type {type(value).__name__}'
    for least in (None, 0):
        with pytest.raises(TypeError, match=f'stride {message}'):
            check_int('stride', value, least)


def test_integer_out_of_range():
    check_int('stride', 2, 2)
    with pytest.raises(ValueError, match='stride must be at least 2, got 1'):
        check_int('stride', 1, 2)


@pytest.mark.parametrize('value', [2, -0.5, np.float32(2), np.int8(1), math.inf])
def test_numbers(value):
    check_number('scale', value)


@pytest.mark.parametrize('value', NO_NUMBERS, ids=repr)
@pytest.mark.parametrize('check', [check_number, check_rate])
def test_no_numbers(check, value):
    message = f'must be a number, got .* of type {type(value).__name__}'
    with pytest.raises(TypeError, match=f'scale {message}'):
        check('scale', value)


def test_flags():
    check_bool('log_scalars', True)
    check_bool('log_scalars', False)
    for value in (1, 0, 'yes', None, np.True_, torch.tensor(True)):
        with pytest.raises(TypeError, match=r'log_scalars must be a bool, got .* type'):
            check_bool('log_scalars', value)


def test_rates():
    for rate in (0, 0.0, 0.999, np.float32(0.5)):
        check_rate('drop', rate)
    for rate in (1, 1.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r'drop must be in \[0, 1\), got '):
            check_rate('drop', rate)


def test_sizes():
    assert check_size('window_size', 7) == (7, 7)
    assert check_size('window_size', [7, 5]) == (7, 5)
    assert check_size('window_size', (7, np.int64(5))) == (7, 5)
    for size in (0, (7, 0), [-1, 7]):
        with pytest.raises(ValueError, match='window_size must be at least 1, got'):
            check_size('window_size', size)


@pytest.mark.parametrize(
    'size',
    [*NO_INTEGERS, (7,), (7, 7, 7), (7, True), (False, 7), (7, 7.0), torch.Size([7])],
    ids=repr,
)
def test_no_sizes(size):
    message = r'window_size must be an integer or \(height, width\), got .* of type '
    with pytest.raises(TypeError, match=message):
        check_size('window_size', size)


@pytest.mark.parametrize('module', ['checks', 'archs', 'datasets.shapes'])
def test_needs_no_torch(module):
    """Each worker process of the shapes generator imports these anew."""
    code = f'import sys, deform_gqa.{module}; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
