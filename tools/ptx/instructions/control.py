"""Control flow and barriers (PTX ISA, "Control Flow Instructions"; "Parallel Synchronization and Communication
Instructions": bar, barrier, bar.warp.sync)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.active import WARP, Active
from ptx.errors import PtxError
from ptx.instructions.registry import builds
from ptx.operands import reader, refuse
from ptx.source import Immediate, Instruction
from ptx.types import TYPES

if TYPE_CHECKING:
    from ptx.block import Block
    from ptx.program import Program, Step


@builds("bra")
def build_branch(program: Program, instruction: Instruction, step: Step) -> None:
    refuse(instruction, {"uni"})
    step.control, step.target = "branch", program.label(instruction.operands[0])


@builds("ret", "exit")
def build_end(program: Program, instruction: Instruction, step: Step) -> None:
    refuse(instruction, {"uni"})
    step.control = "exit"


@builds("trap")
def build_trap(program: Program, instruction: Instruction, step: Step) -> None:
    def execute(block: Block, active: Active) -> None:
        raise PtxError("the kernel traps")

    step.execute = execute


@builds("bar", "barrier")
def build_barrier(program: Program, instruction: Instruction, step: Step) -> None:
    """Of all threads of the block, or bar.warp.sync of those that a mask names."""
    if instruction.modifiers == ("warp", "sync"):
        return _build_warp_barrier(program, instruction, step)
    if instruction.modifiers not in (("sync",), ("cta", "sync"), ("sync", "aligned"), ("cta", "sync", "aligned")):
        raise PtxError(f"an instruction that is not known to the interpreter: bar.{'.'.join(instruction.modifiers)}")
    if len(instruction.operands) != 1 or not isinstance(instruction.operands[0], Immediate):
        raise PtxError("expected a barrier of a constant number, for all threads")
    step.control = "barrier"


def _build_warp_barrier(program: Program, instruction: Instruction, step: Step) -> None:
    members = reader(program, instruction.operands[0], TYPES["u32"])

    def execute(block: Block, active: Active) -> None:
        expect_members(active, np.broadcast_to(members(block), block.shape))
        # A part of a warp that waits for itself orders nothing between the others, which is not told apart: such
        # accesses count as unordered.
        whole = active.by_warp.all(1)
        block.shared.pass_warp_barrier(np.flatnonzero(whole))

    step.execute = execute


def expect_members(active: Active, masks: np.ndarray) -> np.ndarray:
    """Raise unless each active thread's mask has just the lanes that are here; the masks of the warps, [warps, 32]."""
    lanes = (masks.reshape(-1, WARP)[:, :, None] >> np.arange(WARP, dtype=np.uint32)) & np.uint32(1)
    here = active.by_warp
    wrong = here & (lanes.astype(bool) != here[:, None, :]).any(2)
    if wrong.any():
        warp, lane = np.argwhere(wrong)[0]
        mask, present = int(masks.reshape(-1, WARP)[warp, lane]), int((here[warp] * (1 << np.arange(WARP))).sum())
        raise PtxError(f"thread {warp * WARP + lane}: expected the lanes of its mask {mask:#010x}, got {present:#010x}")
    return lanes.astype(bool)
