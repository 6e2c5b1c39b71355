"""Instructions that compute a value of each thread's own operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ptx.operands import expect_operands, reader, writer
from ptx.source import Instruction
from ptx.types import Array, Type

if TYPE_CHECKING:
    from ptx.active import Active
    from ptx.block import Block
    from ptx.program import Program, Step


def elementwise(
    program: Program,
    instruction: Instruction,
    step: Step,
    result: Type,
    sources: list[Type],
    function: Callable[..., Array],
) -> None:
    """d = function(a, b, ...)."""
    expect_operands(instruction, 1 + len(sources))
    write = writer(program, instruction.operands[0], result)
    reads = [reader(program, o, kind) for o, kind in zip(instruction.operands[1:], sources, strict=True)]

    def execute(block: Block, active: Active) -> None:
        write(block, active, function(*(read(block) for read in reads)))

    step.execute = execute
