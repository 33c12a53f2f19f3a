"""Groups of heads, on plain tensors."""

import pytest
import torch

from deform_gqa.conversion.grouping import (
    adjacent_groups,
    check_groups,
    head_similarity,
    similar_groups,
)


def similarity(groups, num_heads):
    """1 within each group, 0 elsewhere."""
    matrix = torch.eye(num_heads, dtype=torch.float64)
    for group in groups:
        for i in group:
            for j in group:
                matrix[i, j] = 1
    return matrix


def test_adjacent():
    assert adjacent_groups(6, 3) == [[0, 1], [2, 3], [4, 5]]
    assert adjacent_groups(2, 2) == [[0], [1]]


@pytest.mark.parametrize('num_groups', [0, 4, 12])
def test_numbers_that_do_not_divide(num_groups):
    with pytest.raises(ValueError, match=f'the 6 heads, got {num_groups}'):
        adjacent_groups(6, num_groups)


@pytest.mark.parametrize(
    'groups',
    [
        [[0, 3], [1, 2]],
        [[0, 5], [1, 4], [2, 3]],
        [[0, 2, 7, 9], [1, 4, 5, 8], [3, 6, 10, 11]],
    ],
)
def test_similar_heads_are_found(groups):
    num_heads = sum(map(len, groups))
    assert similar_groups(similarity(groups, num_heads), len(groups)) == groups


def test_similar_heads_within_blocks_of_a_period():
    """Blocks of 4 heads have to be reordered alike: here the second one decides."""
    wanted = similarity([[4, 6], [5, 7]], 8) + 0.5 * similarity([[0, 3], [1, 2]], 8)
    groups = similar_groups(wanted, 4, period=4)
    assert [sorted(group) for group in groups] == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_a_period_of_one_allows_neighbours_alone():
    wanted = similarity([[0, 3], [1, 2]], 4)
    assert similar_groups(wanted, 2, period=1) == [[0, 1], [2, 3]]


def test_similarity_is_a_cosine():
    heads = torch.randn(3, 4, 5, dtype=torch.float64)
    heads[1], heads[2] = 3 * heads[0], -heads[0]
    expected = torch.tensor([[1, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    torch.testing.assert_close(head_similarity(heads), expected)


def test_similarity_after_rotation():
    """Heads that differ by a rotation of their channels are equal; others are not."""
    heads = torch.randn(3, 4, 5, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    heads[1] = rotation @ heads[0]
    found = head_similarity(heads, rotate=True)
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))
    assert found[0, 1] > 1 - 1e-9
    assert found[0, 2] < 0.99
    assert head_similarity(heads)[0, 1] < 0.99


def test_given_groups():
    assert check_groups([(3, 0), (2, 1)], 4, 2) == [[3, 0], [2, 1]]
    assert check_groups([[2, 3], [1, 0]], 4, 2, period=1) == [[0, 1], [2, 3]]
    groups = [[5, 7], [0, 2], [1, 3], [4, 6]]
    expected = [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert check_groups(groups, 8, 4, period=4) == expected


@pytest.mark.parametrize(
    'groups',
    [
        [[0, 1]],
        [[0, 1], [2]],
        [[0, 1], [1, 2]],
        [[0, 1], [2, 4]],
        [[0, 1, 2, 3]],
        [0, 1, 2, 3],
        [[0, 1], [2, '3']],
        [[0, 1], [2.0, 3]],
    ],
)
def test_lists_that_are_no_groups(groups):
    with pytest.raises(ValueError, match='2 lists of equal length'):
        check_groups(groups, 4, 2)


@pytest.mark.parametrize(
    ('groups', 'period'),
    [
        ([[0, 2], [1, 3]], 2),
        ([[0, 2], [1, 3], [4, 5], [6, 7]], 4),
        ([[0, 1, 4, 5], [2, 3, 6, 7]], 2),
    ],
)
def test_groups_that_a_module_cannot_have(groups, period):
    num_heads = sum(map(len, groups))
    with pytest.raises(ValueError, match=f'within blocks of {period} heads'):
        check_groups(groups, num_heads, len(groups), period)
