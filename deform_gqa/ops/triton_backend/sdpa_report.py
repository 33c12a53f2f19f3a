"""Loads, atomics and instructions of the compiled deform_sdpa kernels, without a GPU.

    python -m deform_gqa.ops.triton_backend.sdpa_report

All counts are of the loop over points. Loads and atomics are those of one lane: a tile
of BQ queries and one kv head costs so many, whatever the number of its query heads.
"""

import dataclasses
from collections import Counter

import torch

from . import aot
from .deform_sdpa_bwd import deform_sdpa_backward
from .deform_sdpa_fwd import deform_sdpa_forward


@dataclasses.dataclass
class PointReport:
    """What one iteration of the loop over points does.

    Attributes:
        kernel: Registers, spills and shared memory of the whole kernel.
        map_loads: Loads from k and v a lane.
        load_bytes: Bytes of each.
        atomics: Atomics to dk and dv a lane.
        barriers: Barriers and accesses of shared memory.
        instructions: Of all lanes, for one (query, point, query head).
    """

    kernel: aot.KernelReport
    map_loads: int
    load_bytes: int
    atomics: int
    barriers: int
    instructions: float


def sdpa_launches(
    arch: int, head_dim: int, dtype: torch.dtype, heads_per_kv: int
) -> list[aot.Launch]:
    """Forward and backward launch of a call with two views of 8 x 8 pixels."""
    q = torch.zeros(1, 2, heads_per_kv, 64, head_dim, dtype=dtype)
    k = torch.zeros(1, 2, 1, 64, head_dim, dtype=dtype)
    coords = torch.zeros(1, 2, 1, 64, 2, 4, 2)
    options = dict(seed=0, grid_size=(8, 8), scale=0.1, dropout_p=0.0)
    with aot.record_launches(arch) as launches:
        out, lse = deform_sdpa_forward(q, k, k, coords, **options)
        deform_sdpa_backward(q, out, lse, q, k, k, coords, **options)
    return launches


def report_points(launch: aot.Launch, arch: int) -> PointReport:
    """Compiles a launch and counts in its loop."""
    kernel = aot.compile_launch(launch, arch)
    tile = launch.arguments['BQ'] * launch.arguments['BR']
    report = aot.inspect_cubin(launch.name, arch, kernel, tile)
    _, sass = aot.disassemble(kernel.asm['cubin'])
    names = Counter(text.split()[0] for text in aot._loop_with_exp(sass))

    def count(*starts: str) -> int:
        return sum(n for name, n in names.items() if name.startswith(starts))

    wide = {16: names['LDG.E.128'], 8: names['LDG.E.64']}
    load_bytes = max(wide, key=wide.get)
    return PointReport(
        kernel=report,
        map_loads=wide[load_bytes],
        load_bytes=load_bytes,
        atomics=count('RED', 'ATOM'),
        barriers=count('BAR', 'LDS', 'STS', 'LDSM', 'STSM'),
        instructions=names.total() * 32 * kernel.metadata.num_warps / tile,
    )


def main() -> None:
    print(
        f'{"kernel":24} {"sm":>3} {"dtype":>9} {"D":>3} {"heads":>5} {"registers":>9} '
        f'{"spills_B":>8} {"loads":>11} {"atomics":>7} {"barriers":>8} {"instr":>6}'
    )
    for arch in aot.SHARED_LIMITS:
        for dtype in (torch.float32, torch.bfloat16):
            for head_dim in (32, 64):
                for heads in (1, 8):
                    for launch in sdpa_launches(arch, head_dim, dtype, heads):
                        x = report_points(launch, arch)
                        print(
                            f'{launch.name:24} {arch:3} '
                            f'{str(dtype).removeprefix("torch."):>9} {head_dim:3} '
                            f'{heads:5} {x.kernel.registers:9} '
                            f'{x.kernel.stack_bytes + x.kernel.local_bytes:8} '
                            f'{x.map_loads:3} x {x.load_bytes:3} B {x.atomics:7} '
                            f'{x.barriers:8} {x.instructions:6.0f}',
                            flush=True,
                        )


if __name__ == '__main__':
    main()
