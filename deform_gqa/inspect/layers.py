"""What the D layers of a DAT backbone launch, and what it costs by the pipe model.

Tensors are those that ``models/layers/deformable_gqa.py`` passes: rows of heads beside
each other in the memory of a token, for k and v (B, S, C) as for q (B, H * W, C).
"""

import dataclasses
import math
from collections.abc import Iterator

import torch

from deform_gqa.archs import NUM_STAGES, resolve_arch
from deform_gqa.ops.deform_attn.triton_launch import (
    deform_attn_backward,
    deform_attn_forward,
)

from . import aot, pipes, sass

IMAGES = ((800, 1333), (224, 224))
BATCH = 2
PASSES = {
    'deform_attn_fwd_kernel': 'fwd',
    'deform_attn_dq_kernel': 'dq',
    'deform_attn_dkdv_kernel': 'dkdv',
    'deform_attn_dkdv_dbias_kernel': 'dkdv',
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A stage's D layer, of which the backbone has ``count``."""

    stage: int
    image: tuple[int, int]
    count: int
    map_size: tuple[int, int]
    grid: tuple[int, int]
    heads: int
    groups: int
    head_dim: int
    table_size: int


def layers(image: tuple[int, int], arch: str = 't++') -> list[Layer]:
    """The D layers of each stage of a backbone; stages count from 1."""
    options = resolve_arch(arch)
    found = []
    for i in range(NUM_STAGES):
        map_size = tuple(math.ceil(side / 2 ** (i + 2)) for side in image)
        kernel, stride = options['offset_kernel_sizes'][i], options['strides'][i]
        padding = kernel // 2 if kernel != stride else 0
        heads = options['num_heads'][i]
        found.append(
            Layer(
                stage=i + 1,
                image=image,
                count=options['block_types'][i].count('D'),
                map_size=map_size,
                grid=tuple((x + 2 * padding - kernel) // stride + 1 for x in map_size),
                heads=heads,
                groups=options['offset_groups'][i],
                head_dim=options['embed_dims'][i] // heads,
                table_size=2 * options['table_sizes'][i] - 1,
            )
        )
    return found


def _tokens(heads: int, count: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, heads, count, D) in (B, count, heads * D) memory."""
    x = torch.empty(BATCH, count, heads, head_dim, dtype=dtype)
    return x.transpose(1, 2)


def launches(
    layer: Layer, gpu_arch: int, dtype: torch.dtype, head_dim: int | None = None
) -> list[aot.Launch]:
    """The attention kernels of a layer, forward and backward.

    Args:
        head_dim: Another one than the layer's, with as many heads.
    """
    head_dim = layer.head_dim if head_dim is None else head_dim
    keys = math.prod(layer.grid)
    q = _tokens(layer.heads, math.prod(layer.map_size), head_dim, dtype)
    k, v = (_tokens(layer.heads, keys, head_dim, dtype) for _ in range(2))
    pos = torch.empty(BATCH, layer.groups, keys, 2)
    table = torch.empty(layer.heads, layer.table_size, layer.table_size)
    options = dict(
        seed=0,
        grid_size=layer.map_size,
        scale=head_dim**-0.5,
        dropout_p=0.0,
        pos_in_range=True,
    )
    with aot.record_launches(gpu_arch) as found:
        out, lse = deform_attn_forward(q, k, v, pos, table, **options)
        deform_attn_backward(q, out, lse, q, k, v, pos, table, **options)
    return [launch for launch in found if launch.name in PASSES]


def pass_name(launch: aot.Launch) -> str:
    """'fwd', 'dq', 'dkdv' or, where the gradient of the bias is separate, 'dbias'."""
    name = PASSES[launch.name]
    return 'dbias' if launch.arguments.get('KEY_GRAD') is False else name


def iterations(launch: aot.Launch) -> int:
    """Of the innermost loop with an exp, in one program: tiles of keys or patches."""
    x = launch.arguments
    if 'HS' in x:
        return math.ceil(x['num_keys'] / x['BN'])
    patches = math.ceil(x['height'] / x['R']) * math.ceil(x['width'] / x['C'])
    return math.ceil(patches / x['num_splits']) * x['heads_per_kv']


@dataclasses.dataclass
class LaunchReport:
    """A compiled launch of a layer.

    Attributes:
        tile: Queries (rows x columns) x keys.
        registers, spill_bytes, shared_bytes: Of a thread, a thread, a program.
        warps_at_once: Warps that a multiprocessor holds.
        barriers: Of a tile.
        serialised: Whether ptxas serialises products of warp groups (C7515).
        programs, waves: Programs, and how often they fill the GPU.
        instructions: Executed ones a (query, key) pair of a tile, times a thread.
        clocks: By pipe, of a multiprocessor for 1,000 pairs of a tile.
        bound_us: Of the launch, by the pipe that binds.
        binds: That pipe.
    """

    name: str
    head_dim: int
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps_at_once: int
    barriers: int
    serialised: bool
    programs: int
    waves: float
    instructions: float
    clocks: dict[str, float]
    bound_us: float
    binds: str


def report(launch: aot.Launch, gpu_arch: int) -> LaunchReport:
    """Compiles a launch and applies the pipe model, of an H100 whatever the arch.

    What stands outside the loop counts once a program.
    """
    size, warps = launch.arguments, launch.options['num_warps']
    kernel = aot.compile_launch(launch, gpu_arch)
    pairs = size['R'] * size['C'] * size['BN']
    used = aot.inspect_cubin(launch.name, gpu_arch, kernel, pairs)
    code = sass.parse(aot.disassemble(kernel.asm['cubin']))
    span = sass.loop_with_exp(code)
    loop = [code.instructions[i] for i in sass.executed(code, span)]
    outside = [x for i, x in enumerate(code.instructions) if i not in span]
    tile = pipes.pipe_clocks(loop, warps)
    rest = pipes.pipe_clocks(outside, warps)
    count = iterations(launch)
    program = {pipe: count * tile[pipe] + rest[pipe] for pipe in tile}
    programs = math.prod(launch.grid)
    at_once = pipes.programs_at_once(used.registers, used.shared_bytes, warps)
    has_wgmma = any(x.startswith('HGMMA') for x in loop)
    return LaunchReport(
        name=pass_name(launch),
        head_dim=size['head_dim'],
        tile=f'{size["R"]}x{size["C"]}x{size["BN"]}',
        registers=used.registers,
        spill_bytes=used.stack_bytes + used.local_bytes,
        shared_bytes=used.shared_bytes,
        warps_at_once=at_once * warps,
        barriers=sum(x.startswith('BAR') for x in loop),
        serialised=has_wgmma and bool(aot.serialised_products(kernel, gpu_arch)),
        programs=programs,
        waves=programs / (at_once * pipes.H100.multiprocessors),
        instructions=used.per_pair['all'],
        clocks={pipe: 1000 * clocks / pairs for pipe, clocks in tile.items()},
        bound_us=pipes.bound_us(program, programs),
        binds=max(program, key=program.get),
    )


def reports(
    image: tuple[int, int],
    gpu_arch: int,
    dtype: torch.dtype,
    head_dim: int | None = None,
    arch: str = 't++',
) -> Iterator[tuple[Layer, LaunchReport]]:
    """Every launch of every stage's layer."""
    for layer in layers(image, arch):
        for launch in launches(layer, gpu_arch, dtype, head_dim):
            yield layer, report(launch, gpu_arch)
