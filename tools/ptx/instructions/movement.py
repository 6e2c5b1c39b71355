"""mov, cvta and what else makes values of values (PTX ISA, "Data Movement and Conversion Instructions")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import PtxError
from ptx.instructions.elementwise import elementwise
from ptx.instructions.registry import builds
from ptx.operands import LOCAL_WINDOW, SHARED_WINDOW, reader, readers, refuse, writers
from ptx.source import Instruction, Vector
from ptx.types import TYPES, UNSIGNED, Type

if TYPE_CHECKING:
    from ptx.active import Active
    from ptx.block import Block
    from ptx.program import Program, Step


@builds("mov")
def build_mov(program: Program, instruction: Instruction, step: Step) -> None:
    """A copy; {a, b} to one register and back: the first element is the lowest."""
    refuse(instruction, set())
    kind = instruction.types()[-1]
    target, source = instruction.operands
    if isinstance(source, Vector):
        _pack(program, instruction, step, kind, len(source.elements))
    elif isinstance(target, Vector):
        _unpack(program, instruction, step, kind, len(target.elements))
    else:
        elementwise(program, instruction, step, kind, [kind], lambda x: x)


def _part(kind: Type, count: int) -> Type:
    return TYPES[f"u{kind.bits // count}"]


def _pack(program: Program, instruction: Instruction, step: Step, kind: Type, count: int) -> None:
    part = _part(kind, count)
    reads = readers(program, instruction.operands[1], part)
    (write,) = writers(program, instruction.operands[0], TYPES[f"u{kind.bits}"])
    dtype = UNSIGNED[kind.bits]

    def execute(block: Block, active: Active) -> None:
        value = dtype(0)
        for i, read in enumerate(reads):
            value = value | (np.asarray(read(block)).astype(dtype) << dtype(part.bits * i))
        write(block, active, value)

    step.execute = execute


def _unpack(program: Program, instruction: Instruction, step: Step, kind: Type, count: int) -> None:
    part = _part(kind, count)
    read = reader(program, instruction.operands[1], TYPES[f"u{kind.bits}"])
    writes = writers(program, instruction.operands[0], part)
    dtype = UNSIGNED[kind.bits]

    def execute(block: Block, active: Active) -> None:
        value = np.asarray(read(block))
        for i, write in enumerate(writes):
            write(block, active, (value >> dtype(part.bits * i)).astype(part.dtype))

    step.execute = execute


@builds("cvta")
def build_cvta(program: Program, instruction: Instruction, step: Step) -> None:
    """Between addresses of a state space and generic ones; those of global memory are the same."""
    kind = instruction.types()[-1]
    spaces = {"global": 0, "const": 0, "param": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
    refuse(instruction, {*spaces, "to", "cta"})
    space = next(word for word in instruction.modifiers if word in spaces)
    if kind.bits != 64:
        raise PtxError("expected addresses of 64 bits")
    window = np.uint64(spaces[space])
    if "to" in instruction.modifiers:
        elementwise(program, instruction, step, kind, [kind], lambda x: x - window)
    else:
        elementwise(program, instruction, step, kind, [kind], lambda x: x + window)
