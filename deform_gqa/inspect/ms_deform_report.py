"""What the compiled kernels of ms_deform_attn do for a sample, without a GPU.

The kernels are those of an encoder of Deformable DETR on an image of 800 x 1333 (four
levels, four points, eight heads of 32). Beside them stand those of msda-triton,
compiled for the same call, where the environment names a copy of it (see
``benchmark/ops``).
``print_table`` is part of ``tools/kernel_report.py``.

Bounds are those of ``pipes`` and two more: bytes of pixels and atomics through the L1
cache, 128 a clock and multiprocessor as for shared memory, to which they are added.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterable, Iterator

import torch
import triton
from triton.compiler.errors import CompilationError

from . import aot, pipes, sass
from .representative import PYRAMID, multi_scale

HEADS, POINTS = 8, 4
# Warps that msda-triton's tuning tries, and a dtype that it takes.
FOREIGN_WARPS, FOREIGN_DTYPE = (2, 4), torch.float32
FOREIGN_VARIABLE = 'MSDA_TRITON'
HEADER = (
    f'{"kernel":42} {"sm":>3} {"dtype":>8} {"warps":>5} {"registers":>9} '
    f'{"spills_B":>8} {"shared_B":>8}  per sample: '
    f'{"instructions":>12} {"loads":>11} {"atomics":>11} {"bound us":>9}  binds'
)


@dataclasses.dataclass
class SampleReport:
    """A compiled launch; what it executes for one sample of a head.

    Attributes:
        kernel: Registers, spills and shared memory.
        warps: Of a program.
        instructions, loads, atomics: Of warps, executed; those of the usual width.
        load_bytes, atomic_bytes: Of a lane's usual load of pixels, and atomic.
        bound_us: Of the launch, by the pipe that binds.
        binds: That pipe.
    """

    kernel: aot.KernelReport
    dtype: torch.dtype
    warps: int
    instructions: float
    load_bytes: int
    loads: float
    atomic_bytes: int
    atomics: float
    bound_us: float
    binds: str

    def __str__(self) -> str:
        used = self.kernel
        name = used.name.replace('triton_multi_scale_deformable_attention', 'msda')
        atomics = '-'
        if self.atomics:
            atomics = f'{self.atomics:.1f} x {self.atomic_bytes} B'
        return (
            f'{name:42} {used.arch:3} {str(self.dtype).removeprefix("torch."):>8} '
            f'{self.warps:5} {used.registers:9} '
            f'{used.stack_bytes + used.local_bytes:8} {used.shared_bytes:8}  '
            f'{"":12}{self.instructions:12.1f} '
            f'{f"{self.loads:.1f} x {self.load_bytes} B":>11} {atomics:>11} '
            f'{self.bound_us:9.0f}  {self.binds}'
        )


def times_executed(code: sass.Code) -> list[int]:
    """How often each instruction runs: loops over levels, and over points in them."""
    spans = sass.loops(code)
    trips = (1, len(PYRAMID), len(PYRAMID) * POINTS)
    return [
        trips[min(sum(i in span for span in spans), 2)]
        for i in range(len(code.instructions))
    ]


def _bytes(name: str) -> int:
    """Of a lane's access of global memory."""
    widths = {'128': 16, 'F32x4': 16, '64': 8, 'F32x2': 8, 'U16': 2, 'F16x2': 4}
    parts = name.split('.')
    return next((size for text, size in widths.items() if text in parts), 4)


def _usual(counts: dict[int, int]) -> int:
    """The width through which most bytes go."""
    return max(counts, key=lambda size: size * counts[size], default=0)


def report_samples(launch: aot.Launch, arch: int, dtype: torch.dtype) -> SampleReport:
    """Compiles a launch and counts what a program executes."""
    kernel = aot.compile_launch(launch, arch)
    code = sass.parse(aot.disassemble(kernel.asm['cubin']))
    warps = launch.options['num_warps']
    loads: dict[int, int] = {}
    atomics: dict[int, int] = {}
    clocks = dict.fromkeys(pipes.PIPES, 0.0)
    total = 0
    for instruction, times in zip(code.instructions, times_executed(code), strict=True):
        total += times
        name = sass.opcode(instruction)
        for pipe, taken in pipes.pipe_clocks([instruction], warps).items():
            clocks[pipe] += times * taken
        for starts, found in ((('LDG',), loads), (('RED', 'ATOM'), atomics)):
            if name.startswith(starts):
                size = _bytes(name)
                found[size] = found.get(size, 0) + times
                moved = 32 * size * times * warps
                clocks['shared'] += moved / pipes.SHARED_BYTES_A_CLOCK
    pixels = sum(height * width for height, width in PYRAMID)
    programs = 1
    for size in launch.grid:
        programs *= size
    samples = pixels * HEADS * len(PYRAMID) * POINTS / programs
    width, atomic_width = _usual(loads), _usual(atomics)
    return SampleReport(
        kernel=aot.inspect_cubin(launch.name, arch, kernel, 1),
        dtype=dtype,
        warps=warps,
        instructions=total * warps / samples,
        load_bytes=width,
        loads=loads.get(width, 0) * warps / samples,
        atomic_bytes=atomic_width,
        atomics=atomics.get(atomic_width, 0) * warps / samples,
        bound_us=pipes.bound_us(clocks, programs),
        binds=max(clocks, key=clocks.get),
    )


def foreign_launches() -> Iterator[aot.Launch]:
    """Those of msda-triton, for each number of warps; none without a copy of it."""
    folder = os.environ.get(FOREIGN_VARIABLE)
    if not folder:
        return
    sys.path.insert(0, folder)
    try:
        kernels = importlib.import_module('msda_triton.kernels')
    finally:
        sys.path.pop(0)
    pixels = sum(height * width for height, width in PYRAMID)
    value = torch.empty(1, pixels, HEADS, 32, dtype=FOREIGN_DTYPE)
    locations = torch.empty(1, pixels, HEADS, len(PYRAMID), POINTS, 2)
    weights = torch.empty(locations.shape[:-1], dtype=FOREIGN_DTYPE)
    inputs = value, locations, weights, torch.tensor(PYRAMID)
    outputs = {'fwd': (value,), 'bwd': (value, locations, weights, value)}
    sizes = (1, pixels, 32, pixels, HEADS, len(PYRAMID), POINTS)
    blocks = 32, triton.next_power_of_2(len(PYRAMID)), triton.next_power_of_2(POINTS)
    name = 'triton_multi_scale_deformable_attention'
    for direction, written in outputs.items():
        tuned = getattr(kernels, f'{name}_{direction}_kernel')
        names = tuned.fn.arg_names
        arguments = (*written, *inputs, *sizes, *blocks, 'zeros', False)
        for warps in FOREIGN_WARPS:
            yield aot.Launch(
                tuned.fn,
                (pixels, 1, HEADS),
                dict(zip(names, arguments, strict=True)),
                dict(num_warps=warps),
            )


def print_table(archs: Iterable[int], dtypes: Iterable[torch.dtype]) -> None:
    """Every kernel of ms_deform_attn, and those of msda-triton."""
    print(HEADER)
    dtypes = list(dtypes)
    for arch in archs:
        for dtype in dtypes:
            for launch in multi_scale(arch, 32, dtype):
                print(report_samples(launch, arch, dtype), flush=True)
        for launch in foreign_launches():
            try:
                print(report_samples(launch, arch, FOREIGN_DTYPE), flush=True)
            except CompilationError:
                print(
                    f'{launch.name} does not compile with Triton {triton.__version__}'
                )
