"""Numbers of kv heads, from all ways to say them."""

import pytest

from deform_gqa.conversion.kv_heads import resolve_num_kv_heads

MODULES = {'a.0': (8, 8), 'a.1': (4, 2), 'b.0': (8, 4)}


@pytest.mark.parametrize(
    ('num_kv_heads', 'expected'),
    [
        (None, {'a.0': 8, 'a.1': 2, 'b.0': 4}),
        (2, {'a.0': 2, 'a.1': 2, 'b.0': 2}),
        ('2', {'a.0': 2, 'a.1': 2, 'b.0': 2}),
        (0.25, {'a.0': 2, 'a.1': 1, 'b.0': 2}),
        ('1/4', {'a.0': 2, 'a.1': 1, 'b.0': 2}),
        (1.0, {'a.0': 8, 'a.1': 4, 'b.0': 8}),
        ('1.0', {'a.0': 8, 'a.1': 4, 'b.0': 8}),
        ('4/4', {'a.0': 8, 'a.1': 4, 'b.0': 8}),
        ({'a': 1, r'\.0$': '1/2'}, {'a.0': 1, 'a.1': 1, 'b.0': 4}),
        ({'b': 0.5}, {'b.0': 4}),
    ],
)
def test_numbers(num_kv_heads, expected):
    assert resolve_num_kv_heads(num_kv_heads, MODULES) == expected


@pytest.mark.parametrize(('share', 'expected'), [(1 / 12, 1), (0.0833333, 1), (0.5, 6)])
def test_shares_are_rounded_to_whole_heads(share, expected):
    assert resolve_num_kv_heads(share, {'a': (12, 12)}) == {'a': expected}


@pytest.mark.parametrize(
    ('num_kv_heads', 'message'),
    [
        (3, 'num_kv_heads=3 does not fit a.0: its 8 query heads cannot share 3'),
        (8, 'num_kv_heads=8 does not fit a.1'),
        (0, 'num_kv_heads=0 does not fit'),
        (-2, 'num_kv_heads=-2 does not fit'),
        ('1/8', r"num_kv_heads='1/8' does not fit a.1: its 4 query heads .* share 1/2"),
        ('3/2', "num_kv_heads='3/2' does not fit"),
        ('many', "a fraction such as '1/4', got 'many'"),
        ('1/0', "a fraction such as '1/4', got '1/0'"),
        (1.5, r'must be in \(0, 1\], got 1.5'),
        ({'[': 1}, r"num_kv_heads: '\[' is no regular expression"),
        ({'c': 1}, "the pattern 'c' fits none of the attention modules"),
    ],
)
def test_wrong_numbers(num_kv_heads, message):
    with pytest.raises(ValueError, match=message):
        resolve_num_kv_heads(num_kv_heads, MODULES)


@pytest.mark.parametrize('num_kv_heads', [True, [2], {'a': None}])
def test_wrong_types(num_kv_heads):
    with pytest.raises(TypeError, match='num_kv_heads must be an integer'):
        resolve_num_kv_heads(num_kv_heads, MODULES)


def test_patterns_of_another_type():
    with pytest.raises(TypeError, match='patterns must be strings, got 0 of type int'):
        resolve_num_kv_heads({0: 1}, MODULES)
