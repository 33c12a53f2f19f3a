"""Autocast must not reach into an op: outputs have the dtype of q."""

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context without autocast for this device; does nothing where there is none."""
    # The device meta knows no autocast: torch raises if asked about it.
    if device.type != 'meta' and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
