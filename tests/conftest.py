"""Skips what this machine or process cannot run, and keeps tests apart."""

import os
import sys

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
def own_registry_scope(monkeypatch):
    """A Runner sets the scope in which later tests of the process would build."""
    if 'mmengine' in sys.modules:  # the ops are tested where it is not installed
        scope = sys.modules['mmengine'].DefaultScope
        monkeypatch.setattr(scope, '_instance_dict', scope._instance_dict.copy())
