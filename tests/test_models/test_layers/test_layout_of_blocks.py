"""Blocks copy nothing of the size of a map only to change its layout."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from deform_gqa.models.backbones import DAT

BATCH, CHANNELS = 2, 64
# So large that the tiles that attention works on, of bounded size, are smaller.
MAP_SIZE = (70, 72)
# What reshape and contiguous, pad, and index_copy of new memory come down to.
COPIES = ('aten::clone', 'aten::constant_pad_nd', 'aten::index_copy')


def copies_of(function):
    """Shapes of what ``function`` copies that are as large as a map.

    The profiler sees what kernels call too, such as layer norm of its input.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    shapes = [e.input_shapes[0] for e in profiler.events() if e.name in COPIES]
    least = BATCH * CHANNELS * math.prod(MAP_SIZE)
    return [shape for shape in shapes if math.prod(shape) >= least]


def make(letter, num_kv_heads):
    """A block of this letter, a map with channels last, and a gradient."""
    arch = dict(
        embed_dims=(CHANNELS,) * 4,
        depths=(1,) * 4,
        num_heads=(4,) * 4,
        block_types=(letter,) * 4,
        offset_groups=(2,) * 4,
    )
    x, grad = (
        torch.randn(BATCH, *MAP_SIZE, CHANNELS).permute(0, 3, 1, 2) for _ in range(2)
    )
    block = DAT(arch, num_kv_heads=num_kv_heads, backend='torch').stages[0]
    return block, x.requires_grad_(), grad


@pytest.mark.parametrize('letter', ['N', 'D', 'P', 'X'])
def test_no_copies_forward_and_backward(letter):
    block, x, grad = make(letter, num_kv_heads=2)
    outs = []
    assert copies_of(lambda: outs.append(block(x))) == []
    assert copies_of(lambda: outs[0].backward(grad)) == []


@pytest.mark.parametrize('letter', ['L', 'S'])
def test_windows_do_not_copy_beyond_their_gather_and_scatter(letter):
    """Torch's attention copies where the bias needs a gradient or kv heads are few."""
    block, x, _ = make(letter, num_kv_heads=4)
    with torch.no_grad():
        assert copies_of(lambda: block(x)) == []
