"""Skips what this machine or process cannot run, with the reason."""

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
