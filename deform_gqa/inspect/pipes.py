"""Which execution pipe of a multiprocessor binds compiled code: a static model.

Every instruction takes an issue slot and time of one pipe. The clocks that a tile keeps
each pipe busy are added up; the largest sum is a bound, reached only if the other pipes
and all latencies are hidden behind that one. Rates are those of compute capability 9.0:

- issue: four schedulers of a warp instruction a clock (H100 white paper).
- ALU (64 lanes a clock), FMA and half (128, integer products 64), MUFU and conversions
  (16), packing conversions (F2FP: 64 numbers a clock, two a lane): "Throughput of
  Native Arithmetic Instructions" in the CUDA C++ Programming Guide; which pipe takes
  an instruction that the guide does not name follows its rate there.
- shared memory: 128 bytes a clock (same guide), at least a clock an instruction, and no
  bank conflicts. Shuffles, asynchronous copies into it and the operands that wgmma
  reads there take the same path; B is read once for the four warps of a group.
  Loads from global memory take it too, and are not counted: they are few.
- tensor: 4,096 16-bit multiply-adds a clock (989 TFLOP/s over 132 multiprocessors at
  1.83 GHz); for mma.sync half of it is assumed (Luo et al., arXiv 2402.13499, measured
  62 %), and half of either for TF32.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable

from .sass import opcode

PIPES = ('issue', 'shared', 'ALU', 'MUFU', 'FMA', 'tensor')
WARPS_A_GROUP = 4  # of wgmma
SHARED_BYTES_A_CLOCK = 128
WGMMA_MACS_A_CLOCK, MMA_MACS_A_CLOCK = 4096, 2048

# Clocks that a warp instruction keeps the pipe of the whole multiprocessor busy.
ALU_CLOCKS, PACK_CLOCKS, MUFU_CLOCKS = 32 / 64, 32 / 32, 32 / 16
FMA_CLOCKS, IMAD_CLOCKS, ISSUE_CLOCKS = 32 / 128, 32 / 64, 1 / 4

MUFU = ('MUFU', 'F2I', 'I2F', 'FRND', 'F2F', 'POPC', 'FLO', 'BREV')
ALU = (
    'FMNMX', 'FSETP', 'FSEL', 'FSET', 'ISETP', 'SEL', 'IMNMX', 'VIMNMX', 'LOP3',
    'PLOP3', 'SHF', 'LEA', 'IADD3', 'VIADD', 'IABS', 'PRMT', 'I2FP', 'BMSK', 'SGXT',
    'MOV', 'P2R', 'R2P', 'HMNMX2', 'HSETP2', 'HSET2', 'VOTE', 'FCHK', 'FMNMX3',
)  # fmt: skip
FMA = ('FFMA', 'FADD', 'FMUL', 'HFMA2', 'HADD2', 'HMUL2')


def _arithmetic(name: str) -> tuple[str, float] | None:
    """(pipe, clocks) of an instruction on registers."""
    base = name.split('.')[0]
    if base == 'F2FP':
        return 'ALU', PACK_CLOCKS
    if base in ALU:
        return 'ALU', ALU_CLOCKS
    if base in MUFU:
        return 'MUFU', MUFU_CLOCKS
    if base in FMA:
        return 'FMA', FMA_CLOCKS
    if base == 'IMAD':
        return 'FMA', IMAD_CLOCKS
    return None


def _access_clocks(name: str) -> float:
    """Clocks of shared memory that a warp's access of it takes, without conflicts."""
    base, *modifiers = name.split('.')
    if base in ('LDSM', 'STSM'):
        # So many matrices of 8 x 8 16-bit numbers, 128 bytes each.
        return float(modifiers[-1]) if modifiers[-1].isdigit() else 1.0
    if base in ('LDS', 'STS', 'LDGSTS'):
        bits = next((int(m) for m in modifiers if m in ('64', '128')), 32)
        return 32 * bits / 8 / SHARED_BYTES_A_CLOCK
    return float(base in ('SHFL', 'ATOMS'))


def _wgmma(instruction: str) -> dict[str, float]:
    """Clocks of a wgmma, for each of its four warps.

    After the accumulator comes A, in registers or, with B, by descriptor in shared
    memory.
    """
    m, n, k = map(int, re.search(r'\.(\d+)x(\d+)x(\d+)\.', instruction).groups())
    a_is_shared = 'gdesc' in instruction.split(',')[1]
    operand_bytes = 32 // k
    shared = (n + m * a_is_shared) * k * operand_bytes / SHARED_BYTES_A_CLOCK
    tensor = m * n * k / WGMMA_MACS_A_CLOCK * operand_bytes / 2
    return {'shared': shared / WARPS_A_GROUP, 'tensor': tensor / WARPS_A_GROUP}


def _mma(name: str) -> dict[str, float]:
    """Clocks of mma.sync, of 16 x 8 x k numbers."""
    k = int(re.match(r'HMMA\.168(\d+)', name)[1])
    operand_bytes = 4 if 'TF32' in name else 2
    return {'tensor': 16 * 8 * k / MMA_MACS_A_CLOCK * operand_bytes / 2}


def instruction_clocks(instruction: str) -> dict[str, float]:
    """Clocks of each pipe that a warp instruction takes, issue included."""
    name = opcode(instruction)
    clocks = {'issue': ISSUE_CLOCKS}
    if name.startswith('HGMMA'):
        clocks |= _wgmma(instruction)
    elif name.startswith('HMMA'):
        clocks |= _mma(name)
    elif found := _arithmetic(name):
        clocks[found[0]] = found[1]
    elif access := _access_clocks(name):
        clocks['shared'] = access
    return clocks


def pipe_clocks(instructions: Iterable[str], warps: int) -> dict[str, float]:
    """Clocks of each of PIPES that ``warps`` warps take for these instructions."""
    total = Counter(dict.fromkeys(PIPES, 0.0))
    for instruction in instructions:
        total.update(instruction_clocks(instruction))
    return {pipe: warps * total[pipe] for pipe in PIPES}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The multiprocessors of a GPU. Shared memory is what all programs of one share.

    The default is an H100 SXM at its boost clock.
    """

    multiprocessors: int = 132
    clock_ghz: float = 1.755
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    shared_bytes: int = 228 * 1024


H100 = Gpu()
SHARED_BYTES_OF_SYSTEM = 1024  # which every program takes beside its own


def programs_at_once(
    registers: int, shared_bytes: int, warps: int, gpu: Gpu = H100
) -> int:
    """Programs that fit on a multiprocessor; registers are dealt out by eights."""
    per_warp = 32 * (-(-registers // 8) * 8)
    return min(
        gpu.registers // (per_warp * warps),
        gpu.shared_bytes // (shared_bytes + SHARED_BYTES_OF_SYSTEM),
        gpu.warps // warps,
        gpu.programs,
    )


def bound_us(program_clocks: dict[str, float], programs: int, gpu: Gpu = H100) -> float:
    """Time of a launch whose programs keep the pipes busy for so long.

    The multiprocessor with the most programs ends last, however many it works on at
    once: they share its pipes.
    """
    most = -(-programs // gpu.multiprocessors)
    return most * max(program_clocks.values()) / (gpu.clock_ghz * 1e3)
