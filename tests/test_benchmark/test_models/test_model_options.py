import pytest

from deform_gqa.benchmark.core.errors import OptionError
from deform_gqa.benchmark.core.kv_heads import kv_head_count
from deform_gqa.benchmark.models.options import parse_cfg_options


def test_cfg_options():
    values = ['a.b=1', 'c=x,y', 'd="[(1,2),3]"', 'e=None', 'f=(2,2)']
    expected = {'a.b': 1, 'c': ['x', 'y'], 'd': [(1, 2), 3], 'e': None, 'f': (2, 2)}
    assert parse_cfg_options(values) == expected
    assert parse_cfg_options([]) == {}
    with pytest.raises(OptionError, match="--cfg-options takes KEY=VALUE, got 'a'"):
        parse_cfg_options(['a'])


@pytest.mark.parametrize(
    ('heads', 'choice', 'count'),
    [
        (8, 'full', 8),
        (8, 'half', 4),
        (3, 'half', 1),
        (8, 'one', 1),
        (8, '4', 4),
        (8, '3', 2),  # the largest divisor up to it
        (2, '16', 2),
        (12, '8', 6),
    ],
)
def test_kv_head_count(heads, choice, count):
    assert kv_head_count(heads, choice) == count
