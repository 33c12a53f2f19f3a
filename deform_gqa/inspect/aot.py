"""Compiles the kernels for a GPU that is not there and reads what came out.

``record_launches`` runs the launchers of this package on CPU tensors with the
launches themselves taken out, so that what is compiled is what a call would run.
``compile_launch`` compiles one of them to a cubin, and ``inspect_cubin`` reads it
with the tools inside the triton package. Not under TRITON_INTERPRET.
"""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from deform_gqa.ops.common import triton_host

from . import sass
from .kernel_cache import compile_only

TOOLS = pathlib.Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
# Shared memory that one program may use, in bytes.
SHARED_LIMITS = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}


@dataclasses.dataclass
class Launch:
    """One recorded call of a kernel."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__


@contextlib.contextmanager
def record_launches(arch: int) -> Iterator[list[Launch]]:
    """Collects launches instead of running them, with the block sizes of ``arch``."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        options = {
            name: kwargs.pop(name)
            for name in ('num_warps', 'num_stages', 'maxnreg', 'enable_fp_fusion')
            if name in kwargs
        }
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(Launch(self, grid, arguments, options))

    with (
        mock.patch.object(JITFunction, 'run', record),
        mock.patch.object(triton_host, 'architecture', lambda device: arch),
    ):
        yield launches


def compile_launch(launch: Launch, arch: int):
    """The compiled kernel; its ``asm`` has ttgir, ptx and cubin."""
    with compile_only(arch):
        return launch.kernel.run(
            **launch.arguments, **launch.options, grid=launch.grid, warmup=True
        )


def serialised_products(kernel, arch: int) -> list[str]:
    """ptxas's warnings (C7515 and the like) that wgmma of the kernel are serialised."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, 'kernel.ptx')
        path.write_text(kernel.asm['ptx'])
        target = re.search(r'^\.target (\w+)', kernel.asm['ptx'], re.MULTILINE)[1]
        command = [get_ptxas(arch).path, f'--gpu-name={target}', '--verbose']
        run = subprocess.run(
            [*command, path, '-o', path.with_suffix('.cubin')],
            capture_output=True,
            text=True,
            check=True,
        )
    return [line for line in run.stderr.splitlines() if 'serialized' in line]


@dataclasses.dataclass
class KernelReport:
    """What the compiled code of one launch needs and does.

    Attributes:
        registers: 32-bit registers a thread.
        stack_bytes, local_bytes: Memory that registers spill to; both should be 0.
        shared_bytes: Shared memory of a program.
        tensor_core: Tensor-core instructions (HMMA or HGMMA) in the whole kernel.
        per_pair: Instructions a (query, key) pair of the innermost loop that holds
            an exp, by kind: each counts once a thread, so 32 times a warp. Without
            blocks that nearly every tile skips; empty where a kernel has no such loop.
    """

    name: str
    arch: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    tensor_core: int
    per_pair: dict[str, float]


def _run_tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


@contextlib.contextmanager
def _file_of(cubin: bytes) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, 'kernel.cubin')
        path.write_bytes(cubin)
        yield str(path)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and the like by cuobjdump: registers, bytes of a thread."""
    with _file_of(cubin) as path:
        text = _run_tool('cuobjdump', '-res-usage', path)
    return {name: int(value) for name, value in re.findall(r'\b([A-Z]+):(\d+)', text)}


def disassemble(cubin: bytes) -> str:
    """SASS by nvdisasm."""
    with _file_of(cubin) as path:
        return _run_tool('nvdisasm', '-c', path)


def _kind(instruction: str) -> str:
    name = sass.opcode(instruction)
    if name.startswith(('HMMA', 'HGMMA')):
        return 'mma'
    if name == 'MUFU.EX2':
        return 'exp'
    if name.startswith(('LDG', 'LDGSTS')):
        return 'global loads'
    if name.startswith(('RED', 'ATOM')):
        return 'atomics'
    if name.startswith(('LDS', 'STS', 'LDSM', 'STSM')):
        return 'shared memory'
    return 'other'


def inspect_cubin(
    name: str, arch: int, kernel, pairs_per_iteration: int
) -> KernelReport:
    """Reads the cubin of a compiled kernel."""
    found = resource_usage(kernel.asm['cubin'])
    assembly = disassemble(kernel.asm['cubin'])
    code = sass.parse(assembly)
    loop = sass.executed(code, sass.loop_with_exp(code))
    lanes = 32 * kernel.metadata.num_warps
    counts = Counter(_kind(code.instructions[i]) for i in loop)
    per_pair = {
        kind: count * lanes / pairs_per_iteration for kind, count in counts.items()
    }
    if loop:
        per_pair['all'] = len(loop) * lanes / pairs_per_iteration
    return KernelReport(
        name=name,
        arch=arch,
        registers=found['REG'],
        stack_bytes=found['STACK'],
        local_bytes=found['LOCAL'],
        shared_bytes=kernel.metadata.shared,
        tensor_core=len(re.findall(r'\bHG?MMA\b', assembly)),
        per_pair=per_pair,
    )


def report_launch(launch: Launch, arch: int) -> KernelReport:
    """Compiles a launch and reads the result."""
    kernel = compile_launch(launch, arch)
    size = launch.arguments
    tiled = {'R', 'C', 'BN'} <= size.keys()
    pairs = size['R'] * size['C'] * size['BN'] if tiled else 1
    return inspect_cubin(launch.name, arch, kernel, pairs)
