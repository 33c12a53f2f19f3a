"""Triton launches on the current device: make that the device of the tensors."""

import functools

import torch


def on_device_of_first_tensor(launcher):
    """Runs ``launcher`` with the GPU of its first argument as the current one."""

    @functools.wraps(launcher)
    def run(first, *args, **kwargs):
        with torch.cuda.device_of(first):
            return launcher(first, *args, **kwargs)

    return run
