"""Launches that stand for all: stage 1 of DAT-T++ on an 800 x 1333 image."""

import math
from typing import NamedTuple

import torch

from deform_gqa.ops.deform_attn.triton_launch import (
    deform_attn_backward,
    deform_attn_forward,
)
from deform_gqa.ops.deform_sample.triton_launch import (
    deform_sample_backward,
    deform_sample_forward,
)
from deform_gqa.ops.ms_deform_attn.triton_launch import (
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)
from deform_gqa.ops.neighborhood_attn.triton_launch import (
    neighborhood_attn_backward,
    neighborhood_attn_forward,
)

from . import aot


class Maps(NamedTuple):
    """Sizes (rows, columns) of the map of queries, that of keys and the table."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    table: tuple[int, int]


DETECTION = Maps((200, 334), (25, 42), (111, 111))
# Images of the size that the table was made for; it is as fine as the map.
CLASSIFICATION = Maps((56, 56), (7, 7), (111, 111))
IN_BETWEEN = Maps((100, 100), (13, 13), (111, 111))
# Images much smaller than those: a query skips cells of the table.
TINY = Maps((20, 20), (5, 5), (111, 111))
KERNEL_SIZE = 7
# Levels of a detection transformer on the same image.
PYRAMID = ((100, 167), (50, 84), (25, 42), (13, 21))


def _once_each(launches: list[aot.Launch]) -> list[aot.Launch]:
    """The first launch of each kernel, of the passes of deform_attn's backward too."""
    passes = {
        (launch.name, launch.arguments.get('KEY_GRAD')): launch
        for launch in reversed(launches)
    }
    return list(passes.values())[::-1]


def attention(
    arch: int,
    head_dim: int,
    dtype: torch.dtype,
    bias: bool = True,
    dropout_p: float = 0.0,
    pos_in_range: bool = True,
    heads_per_kv: int = 1,
    maps: Maps = DETECTION,
) -> list[aot.Launch]:
    """Every kernel of a deform_attn call, forward and backward, in launch order."""
    heads = 2 * heads_per_kv
    queries, keys = math.prod(maps.queries), math.prod(maps.keys)
    q = torch.empty(1, heads, queries, head_dim, dtype=dtype)
    k, v = torch.empty(2, 1, 2, keys, head_dim, dtype=dtype)
    pos = torch.empty(1, 1, keys, 2) if bias else None
    table = torch.empty(heads, *maps.table) if bias else None
    options = dict(
        seed=0,
        grid_size=maps.queries,
        scale=head_dim**-0.5,
        dropout_p=dropout_p,
        pos_in_range=pos_in_range,
    )
    with aot.record_launches(arch) as launches:
        out, lse = deform_attn_forward(q, k, v, pos, table, **options)
        deform_attn_backward(q, out, lse, q, k, v, pos, table, **options)
    return _once_each(launches)


def sampling(arch: int, dtype: torch.dtype) -> list[aot.Launch]:
    """The kernels of deform_sample on a channels-last map."""
    x = torch.empty(1, 64, *DETECTION.queries, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    pos = torch.empty(1, 1, math.prod(DETECTION.keys), 2)
    with aot.record_launches(arch) as launches:
        out = deform_sample_forward(x, pos)
        deform_sample_backward(out, x, pos)
    return _once_each(launches)


def neighborhood(
    arch: int,
    head_dim: int,
    dtype: torch.dtype,
    kernel_size: int = KERNEL_SIZE,
    dropout_p: float = 0.0,
) -> list[aot.Launch]:
    """The distinct launches of a neighborhood_attn call, forward and backward."""
    places = math.prod(DETECTION.queries)
    q, k, v = torch.empty(3, 1, 2, places, head_dim, dtype=dtype)
    side = 2 * kernel_size - 1
    rpb = torch.empty(2, side, side)
    options = dict(
        seed=0,
        grid_size=DETECTION.queries,
        kernel_size=kernel_size,
        dilation=1,
        scale=head_dim**-0.5,
        dropout_p=dropout_p,
    )
    with aot.record_launches(arch) as launches:
        out, lse = neighborhood_attn_forward(q, k, v, rpb, **options)
        neighborhood_attn_backward(q, out, lse, q, k, v, rpb, **options)
    distinct = {}
    for launch in launches:
        sizes = (launch.arguments.get(name) for name in ('OUT', 'QUERY_GRAD'))
        distinct.setdefault((launch.name, *sizes), launch)
    return list(distinct.values())


def multi_scale(
    arch: int, head_dim: int, dtype: torch.dtype, logits: bool = False
) -> list[aot.Launch]:
    """The kernels of ms_deform_attn in the encoder of Deformable DETR."""
    keys = sum(height * width for height, width in PYRAMID)
    value = torch.empty(1, keys, 8, head_dim, dtype=dtype)
    shapes = torch.tensor(PYRAMID)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    locations = torch.empty(1, keys, 8, len(PYRAMID), 4, 2)
    weights = torch.empty(locations.shape[:-1], dtype=dtype)
    inputs = value, shapes, starts, locations, weights, logits
    with aot.record_launches(arch) as launches:
        out = ms_deform_attn_forward(*inputs)
        ms_deform_attn_backward(out, out, *inputs)
    return launches
