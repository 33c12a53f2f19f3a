import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deform_gqa.datasets.coco import coco_categories, mask_to_polygons, write_json

mask_api = pytest.importorskip('pycocotools.mask')


def rasterise(polygons, height, width):
    return mask_api.decode(
        mask_api.merge(mask_api.frPyObjects(polygons, height, width))
    )


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 17), st.integers(1, 23), st.floats(0, 1), st.integers(0, 2**32 - 1)
)
def test_polygons_rasterise_to_the_mask(height, width, density, seed):
    mask = np.random.default_rng(seed).random((height, width)) < density
    polygons = mask_to_polygons(mask)
    if not mask.any():
        assert polygons == []
        return
    np.testing.assert_array_equal(rasterise(polygons, height, width), mask)


def test_a_hole_stays_a_hole():
    mask = np.ones((9, 11), bool)
    mask[3:6, 4:8] = False
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 2  # cut in two
    np.testing.assert_array_equal(rasterise(polygons, 9, 11), mask)


def test_polygon_of_a_rectangle_is_its_four_corners():
    mask = np.zeros((8, 9), bool)
    mask[2:5, 3:8] = True
    (polygon,) = mask_to_polygons(mask, offset=(10, 20))
    corners = {tuple(point) for point in np.reshape(polygon, (-1, 2))}
    assert len(polygon) == 8
    assert corners == {(13, 22), (18, 22), (18, 25), (13, 25)}


def test_mask_of_other_dimensions_is_refused():
    with pytest.raises(ValueError, match=r'mask .*\(2, 3, 4\)'):
        mask_to_polygons(np.zeros((2, 3, 4)))


def test_categories_count_from_one():
    assert [(c['id'], c['name']) for c in coco_categories('ab')] == [(1, 'a'), (2, 'b')]


def test_write_json_replaces_whole_files(tmp_path):
    path = tmp_path / 'a.json'
    write_json(path, {'b': 1, 'a': [2]})
    assert path.read_bytes() == b'{"a":[2],"b":1}\n'
    with pytest.raises(ValueError):
        write_json(path, {'a': float('nan')})
    assert json.loads(path.read_text()) == {'b': 1, 'a': [2]}
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']
