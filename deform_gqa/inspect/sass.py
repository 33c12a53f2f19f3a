"""Reads the assembly that nvdisasm prints: instructions, loops, what is skipped."""

import re
from typing import NamedTuple

# What a block must not hold to be one that a tile skips: see ``executed``.
WORK = (
    'HGMMA', 'HMMA', 'MUFU', 'LDG', 'STG', 'RED', 'ATOM', 'BAR', 'LDS', 'STS',
)  # fmt: skip


class Code(NamedTuple):
    """Attributes:
    instructions: In order, without predicates, as 'FADD R0, R1, R2'.
    labels: The index of the instruction that each label stands before.
    conditional: Of each instruction, whether it has a predicate.
    """

    instructions: list[str]
    labels: dict[str, int]
    conditional: list[bool]


def parse(sass: str) -> Code:
    """Takes the output of ``nvdisasm -c`` apart."""
    instructions, labels, conditional = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r'\s*(\.L_x_\d+):', line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r'\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;', line):
            conditional.append(found[1] is not None)
            instructions.append(found[2])
    return Code(instructions, labels, conditional)


def opcode(instruction: str) -> str:
    """'LDS.128' of 'LDS.128 R4, [R7]'."""
    return instruction.split()[0]


def branch_target(code: Code, index: int) -> int | None:
    """Where the branch at ``index`` goes to; None for any other instruction."""
    found = re.match(r'BRA.*?(\.L_x_\d+)', code.instructions[index])
    return code.labels.get(found[1]) if found else None


def loops(code: Code) -> list[range]:
    """Instructions of each loop: from a label to the last branch back to it."""
    ends = {}
    for index in range(len(code.instructions)):
        target = branch_target(code, index)
        if target is not None and target <= index:
            ends[target] = index + 1
    return [range(begin, end) for begin, end in ends.items()]


def _is_inside(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def loop_with_exp(code: Code) -> range:
    """The longest among the innermost loops that hold an exp; empty without one."""
    found = [
        loop
        for loop in loops(code)
        if any('MUFU.EX2' in code.instructions[i] for i in loop)
    ]
    innermost = [x for x in found if not any(_is_inside(y, x) for y in found)]
    return max(innermost, key=len, default=range(0))


def executed(code: Code, part: range) -> list[int]:
    """``part`` without the blocks that nearly every tile jumps over.

    Such a block follows a conditional branch forwards and does none of a tile's work:
    no product, exp, access to memory or barrier. In our kernels that is what masks the
    keys behind the last one, in the last tile alone.
    """
    kept, index = [], part.start
    while index < part.stop:
        kept.append(index)
        target = branch_target(code, index)
        block = range(index + 1, target or 0)
        jumps = code.conditional[index] and len(block) > 0 and target < part.stop
        if jumps and not any(code.instructions[i].startswith(WORK) for i in block):
            index = target
        else:
            index += 1
    return kept
