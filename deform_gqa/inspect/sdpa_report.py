"""Loads, atomics and instructions of the compiled deform_sdpa kernels, without a GPU.

All counts are of the loop over points: one iteration samples one point for a tile of
queries and one kv head, whatever the number of its query heads. ``print_table`` is
part of ``tools/kernel_report.py``.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from deform_gqa.ops.deform_sdpa.triton_launch import (
    deform_sdpa_backward,
    deform_sdpa_forward,
)

from . import aot, sass

HEADS_PER_KV = (1, 4, 8)
HEADER = (
    f'{"kernel":28} {"sm":>3} {"D":>4} {"dtype":>9} {"heads":>5} {"registers":>9} '
    f'{"spills_B":>8} {"shared_B":>8} {"tile":>5} {"loads":>9} {"atomics":>9} '
    f'{"barriers":>8}  per point and head: instructions, loads, atomics'
)


@dataclasses.dataclass
class PointReport:
    """What one iteration of the loop over points does.

    Attributes:
        name: Of the kernel, and whether its sums are in fixed point.
        kernel: Registers, spills and shared memory of the whole kernel.
        queries, heads: Of a tile.
        map_loads: Loads from k and v a lane.
        load_bytes: Bytes of each.
        other_loads: All other loads from global memory.
        atomics: Atomics to dk and dv a lane.
        atomic_bytes: Bytes of each.
        barriers: Barriers and accesses of shared memory.
        instructions: Of a lane.
    """

    name: str
    kernel: aot.KernelReport
    queries: int
    heads: int
    map_loads: int
    load_bytes: int
    other_loads: int
    atomics: int
    atomic_bytes: int
    barriers: int
    instructions: int

    def per_head(self, count: int) -> float:
        """Of all lanes, for one (query, point, query head)."""
        return count * 32 / (self.queries * self.heads)


def sdpa_launches(
    arch: int,
    head_dim: int,
    dtype: torch.dtype,
    heads_per_kv: int,
    deterministic: bool = False,
) -> list[aot.Launch]:
    """Forward and backward launch of a call with two views of 8 x 8 pixels."""
    q = torch.zeros(1, 2, heads_per_kv, 64, head_dim, dtype=dtype)
    k = torch.zeros(1, 2, 1, 64, head_dim, dtype=dtype)
    coords = torch.zeros(1, 2, 1, 64, 2, 4, 2)
    options = dict(seed=0, grid_size=(8, 8), scale=0.1, dropout_p=0.0)
    with _determinism(deterministic), aot.record_launches(arch) as launches:
        out, lse = deform_sdpa_forward(q, k, k, coords, **options)
        deform_sdpa_backward(q, out, lse, q, k, k, coords, **options)
    return launches


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def report_points(launch: aot.Launch, arch: int) -> PointReport:
    """Compiles a launch and counts in its loop."""
    kernel = aot.compile_launch(launch, arch)
    queries, heads = launch.arguments['BQ'], launch.arguments['BR']
    report = aot.inspect_cubin(launch.name, arch, kernel, queries * heads)
    code = sass.parse(aot.disassemble(kernel.asm['cubin']))
    names = Counter(sass.opcode(code.instructions[i]) for i in sass.loop_with_exp(code))

    def count(*starts: str) -> int:
        return sum(n for name, n in names.items() if name.startswith(starts))

    wide = {16: names['LDG.E.128'], 8: names['LDG.E.64']}
    load_bytes = max(wide, key=wide.get)
    atomic = next((name for name in names if name.startswith(('RED', 'ATOM'))), '')
    widths = {'F32x4': 16, 'F32x2': 8, 'ADD.64': 8, '': 4}
    is_fixed = launch.arguments.get('FIXED', False)
    return PointReport(
        name=launch.name + ' (fixed)' * is_fixed,
        kernel=report,
        queries=queries,
        heads=heads,
        map_loads=wide[load_bytes],
        load_bytes=load_bytes,
        other_loads=count('LDG') - wide[load_bytes],
        atomics=count('RED', 'ATOM'),
        atomic_bytes=next(size for text, size in widths.items() if text in atomic),
        barriers=count('BAR', 'LDS', 'STS', 'LDSM', 'STSM'),
        instructions=names.total(),
    )


def all_launches(
    arch: int, head_dim: int, dtype: torch.dtype, heads_per_kv: int
) -> list[aot.Launch]:
    """Forward, backward, and backward with sums in fixed point."""
    plain = sdpa_launches(arch, head_dim, dtype, heads_per_kv)
    return plain + sdpa_launches(arch, head_dim, dtype, heads_per_kv, True)[1:]


def describe(x: PointReport, head_dim: int, dtype: torch.dtype, heads: int) -> str:
    """A line below HEADER."""
    atomics = f'{x.atomics} x {x.atomic_bytes:2} B' if x.atomics else '-'
    return (
        f'{x.name.replace("_kernel", ""):28} {x.kernel.arch:3} {head_dim:4} '
        f'{str(dtype).removeprefix("torch."):>9} {heads:5} {x.kernel.registers:9} '
        f'{x.kernel.stack_bytes + x.kernel.local_bytes:8} {x.kernel.shared_bytes:8} '
        f'{f"{x.queries}x{x.heads}":>5} {x.map_loads} x {x.load_bytes:2} B '
        f'{atomics:>9} {x.barriers:8}  {x.per_head(x.instructions):.0f}, '
        f'{x.per_head(x.map_loads):.1f}, {x.per_head(x.atomics):.1f}'
    )


def print_table(
    archs: Iterable[int], head_dims: Iterable[int], dtypes: Iterable[torch.dtype]
) -> None:
    """Every deform_sdpa kernel; heads are the query heads of a kv head."""
    print(HEADER)
    for arch in archs:
        for dtype in dtypes:
            for head_dim in head_dims:
                for heads in HEADS_PER_KV:
                    for launch in all_launches(arch, head_dim, dtype, heads):
                        report = report_points(launch, arch)
                        print(describe(report, head_dim, dtype, heads), flush=True)
