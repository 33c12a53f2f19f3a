"""What a call costs the host: launches, and nothing that waits for the device."""

from unittest import mock

import pytest
import torch

pytest.importorskip('triton')

from triton.runtime.jit import JITFunction

from deform_gqa.inspect.host_time import calls, measure
from deform_gqa.ops.common import backends


def test_launches_of_a_call():
    found = {x.op: (x.forward_launches, x.backward_launches) for x in measure(10)}
    # Key taps and packed table by one launch, of each direction.
    assert found['deform_attn'] == (2, 3)
    assert found['deform_sample'] == (1, 1)
    assert found['deform_sdpa'] == (1, 1)
    assert found['neighborhood_attn'][0] == 2


def test_times_are_positive():
    for found in measure(10):
        assert 0 < found.forward_p5_us <= found.forward_us
        assert 0 < found.backward_p5_us <= found.backward_us


class Waits(Exception):
    pass


@pytest.mark.parametrize('index', range(4))
def test_no_call_waits_for_the_device(index):
    """No number is read from a tensor: a CUDA graph could not be captured."""

    def wait(self, *args):
        raise Waits

    read = ('item', 'tolist', '__int__', '__float__', '__bool__', '__index__', 'cpu')
    _, call, inputs = list(calls())[index]
    patches = [mock.patch.object(torch.Tensor, name, wait) for name in read]
    run = mock.patch.object(JITFunction, 'run', lambda self, *args, **kwargs: None)
    reason = mock.patch.object(backends, '_device_reason', lambda device: None)
    with run, reason:
        grad = torch.zeros_like(call())
        for patch in patches:
            patch.start()
        try:
            with pytest.raises(Waits):
                grad.sum().item()
            torch.autograd.grad(call(), inputs, grad)
        finally:
            for patch in patches:
                patch.stop()
