"""Which kernels a user's images make Triton compile, without compiling them.

A launch is compiled anew for each combination of types, of constants and of integers
that are 1 or multiples of 16: the latter unless a kernel excludes them.
"""

import math
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from deform_gqa.ops.deform_attn.triton_launch import (
    deform_attn_backward,
    deform_attn_forward,
)
from deform_gqa.ops.deform_sample.triton_launch import (
    deform_sample_backward,
    deform_sample_forward,
)

from .kernel_cache import compile_only
from .layers import Layer, layers

BATCH = 2
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9)


def image_sizes() -> Iterator[tuple[int, int]]:
    """60 sizes (height, width) such as training at several scales meets.

    The shorter side is 480 to 800 pixels; the longer one is not rounded, as images of
    a batch are padded to the largest of them.
    """
    for i in range(60):
        short = 480 + 32 * (i % 11)
        long = min(1333, int(short * ASPECTS[i % 4] * (1 + 0.01 * (i // 4))))
        yield (short, long) if i % 3 else (long, short)


def layer_inputs(layer: Layer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a D layer's ops, in the memory layouts that it gives them."""
    channels = layer.heads * layer.head_dim
    keys = math.prod(layer.grid)

    def tokens(count: int) -> torch.Tensor:
        x = torch.empty(BATCH, count, layer.heads, layer.head_dim, dtype=dtype)
        return x.transpose(1, 2)

    x = torch.empty(BATCH, *layer.map_size, channels, dtype=dtype)
    return dict(
        x=x.permute(0, 3, 1, 2),
        pos=torch.empty(BATCH, layer.groups, keys, 2),
        q=tokens(math.prod(layer.map_size)),
        k=tokens(keys),
        v=tokens(keys),
        rpb_table=torch.empty(layer.heads, layer.table_size, layer.table_size),
    )


def call_layer(layer: Layer, dtype: torch.dtype) -> None:
    """The ops of a D layer, forward and backward."""
    inputs = layer_inputs(layer, dtype)
    x, pos = inputs.pop('x'), inputs['pos']
    sampled = deform_sample_forward(x, pos)
    deform_sample_backward(sampled, x, pos)
    options = dict(
        seed=0,
        grid_size=layer.map_size,
        scale=layer.head_dim**-0.5,
        dropout_p=0.0,
        pos_in_range=True,
    )
    q = inputs['q']
    tensors = q, inputs['k'], inputs['v'], pos, inputs['rpb_table']
    out, lse = deform_attn_forward(*tensors, **options)
    deform_attn_backward(q, out, lse, *tensors, **options)


def compilations(
    images: Iterable[tuple[int, int]],
    gpu_arch: int = 90,
    dtype: torch.dtype = torch.bfloat16,
    arch: str = 't++',
) -> set[tuple[str, str]]:
    """(kernel, key) of what training on these images compiles in all D layers."""
    found = set()

    def compile(self, key, *args, **kwargs):
        found.add((self.__name__, key))
        return SimpleNamespace(metadata_group={})

    with mock.patch.object(JITFunction, '_do_compile', compile), compile_only(gpu_arch):
        for image in images:
            for layer in layers(image, arch):
                call_layer(layer, dtype)
    return found
