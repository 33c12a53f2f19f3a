import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def _mmdet_scope():
    """A Runner that other tests made in this process leaves its scope behind."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield
