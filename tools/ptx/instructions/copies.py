"""cp.async (PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy": cp.async and its groups)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.active import Active
from ptx.errors import PtxError
from ptx.instructions.registry import builds
from ptx.operands import address_reader, reader, refuse
from ptx.source import Address, Immediate, Instruction
from ptx.types import TYPES

if TYPE_CHECKING:
    from ptx.block import Block
    from ptx.program import Program, Step


@builds("cp")
def build_copy(program: Program, instruction: Instruction, step: Step) -> None:
    words = instruction.modifiers
    if words == ("async", "commit_group"):
        step.execute = lambda block, active: block.copies.commit(active)
    elif words in (("async", "wait_group"), ("async", "wait_all")):
        operand = instruction.operands[0] if instruction.operands else None
        if words[1] == "wait_group" and not isinstance(operand, Immediate):
            raise PtxError(f"expected a constant number of groups, got {operand}")
        pending = operand.value if isinstance(operand, Immediate) else None
        step.execute = lambda block, active: block.copies.wait(active, pending, block.shared, block.memory)
    elif words[:1] == ("async",) and "bulk" not in words:
        _build_start(program, instruction, step)
    else:
        raise PtxError(f"an instruction that is not known to the interpreter: cp.{'.'.join(words)}")


def _build_start(program: Program, instruction: Instruction, step: Step) -> None:
    """cp.async [shared], [global], size{, bytes of the source}: zeros behind those."""
    refuse(instruction, {"async", "ca", "cg", "shared", "cta", "global", "L2", "cache_hint", "64B", "128B", "256B"})
    operands = instruction.operands
    target, source = (address_reader(program, operand) for operand in operands[:2])
    if not isinstance(operands[2], Immediate) or operands[2].value not in (4, 8, 16):
        raise PtxError(f"expected a copy of 4, 8 or 16 bytes, got {operands[2]}")
    size = operands[2].value
    has_count = len(operands) > 3 and not isinstance(operands[3], Address) and "cache_hint" not in instruction.modifiers
    count = reader(program, operands[3], TYPES["u32"]) if has_count else None

    def execute(block: Block, active: Active) -> None:
        threads = active.index
        # The address of shared memory is one of 32 bits.
        targets, sources = target(block)[threads] & np.uint64(0xFFFFFFFF), source(block)[threads]
        sizes = np.full(len(threads), size)
        if count is not None:
            sizes = np.broadcast_to(count(block), block.shape)[threads].astype(np.int64)
            if (sizes > size).any():
                raise PtxError(f"expected at most {size} bytes of the source, got {int(sizes.max())}")
        if (sources % np.uint64(size)).any():
            raise PtxError(f"misaligned: a copy of {size} bytes from {int(sources[0]):#x}")
        for part in np.unique(sizes[sizes > 0]).tolist():
            block.memory.check(sources[sizes == part], int(part))
        block.shared.begin_copy(threads, targets, size)
        block.copies.start(active, targets, sources, sizes, size)
        if block.banks is not None:
            block.banks.count("cp.async", instruction.line, instruction.text, threads, targets, size)

    step.execute = execute
