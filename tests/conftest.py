"""Skips what this machine or process cannot run, and keeps tests apart."""

import importlib.util
import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    reasons = {}
    if not torch.cuda.is_available():
        reasons['cuda'] = 'needs an NVIDIA GPU'
    if os.environ.get('TRITON_INTERPRET') != '1':
        reasons['interpret'] = 'needs TRITON_INTERPRET=1 in a process of its own'
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Each test builds in mmdet's registries, whatever scope a Runner left behind."""
    if importlib.util.find_spec('mmengine') is None:
        yield  # the ops are tested where no mm package is installed
        return
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmdet'):
        yield
