"""Exchange within a warp (PTX ISA, "Data Movement and Conversion Instructions": shfl.sync; "Parallel Synchronization
and Communication Instructions": vote.sync, redux.sync, activemask)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.active import WARP, Active
from ptx.errors import PtxError
from ptx.instructions.control import expect_members
from ptx.instructions.registry import builds
from ptx.operands import reader, refuse, writer
from ptx.source import SINK, Instruction, Pair
from ptx.types import TYPES, Array

if TYPE_CHECKING:
    from ptx.block import Block
    from ptx.program import Program, Step

_MODES = ("up", "down", "bfly", "idx")


@builds("shfl")
def build_shuffle(program: Program, instruction: Instruction, step: Step) -> None:
    """d = a of another lane; p: whether that lane lies in the segment, else it is the thread's own."""
    refuse(instruction, {"sync", *_MODES})
    mode = next(word for word in instruction.modifiers if word in _MODES)
    u32 = TYPES["u32"]
    target, *sources = instruction.operands
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, SINK)
    write, write_inside = writer(program, first, u32), writer(program, second, TYPES["pred"])
    value, by, clamp, members = (reader(program, operand, u32) for operand in sources)

    def execute(block: Block, active: Active) -> None:
        expect_members(active, np.broadcast_to(members(block), block.shape))
        lane = np.tile(np.arange(WARP), block.shape[0] // WARP)
        distance = np.broadcast_to(by(block), block.shape).astype(np.int64) & 31
        c = np.broadcast_to(clamp(block), block.shape).astype(np.int64)
        segment, bound = c >> 8 & 31, c & 31
        highest = (lane & segment) | (bound & ~segment & 31)
        source = {
            "up": lane - distance,
            "down": lane + distance,
            "bfly": lane ^ distance,
            "idx": (lane & segment) | (distance & ~segment & 31),
        }[mode]
        inside = source >= highest if mode == "up" else source <= highest
        source = np.where(inside, source, lane) + np.arange(block.shape[0]) // WARP * WARP
        missing = active.mask & ~active.mask[source]
        if missing.any():
            thread = int(np.flatnonzero(missing)[0])
            raise PtxError(
                f"thread {thread} asks for the value of thread {int(source[thread])}, which is not in its mask"
            )
        write(block, active, np.broadcast_to(value(block), block.shape)[source])
        write_inside(block, active, inside)

    step.execute = execute


@builds("vote")
def build_vote(program: Program, instruction: Instruction, step: Step) -> None:
    modes = {"all", "any", "uni", "ballot"}
    refuse(instruction, {"sync", *modes})
    mode = next(word for word in instruction.modifiers if word in modes)
    pred, u32 = TYPES["pred"], TYPES["u32"]
    write = writer(program, instruction.operands[0], u32 if mode == "ballot" else pred)
    source, members = reader(program, instruction.operands[1], pred), reader(program, instruction.operands[2], u32)

    def execute(block: Block, active: Active) -> None:
        expect_members(active, np.broadcast_to(members(block), block.shape))
        votes = (np.broadcast_to(source(block), block.shape) & active.mask).reshape(-1, WARP)
        here = active.by_warp
        if mode == "ballot":
            result = (votes * (np.uint64(1) << np.arange(WARP, dtype=np.uint64))).sum(1).astype(np.uint32)
        else:
            every, some = (votes == here).all(1), votes.any(1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        write(block, active, np.repeat(result, WARP))

    step.execute = execute


@builds("redux")
def build_redux(program: Program, instruction: Instruction, step: Step) -> None:
    operations: dict[str, tuple[Callable[..., Array], int]] = {
        "add": (np.add, 0),
        "and": (np.bitwise_and, -1),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
        "min": (np.minimum, 1),
        "max": (np.maximum, 1),
    }
    refuse(instruction, {"sync", *operations})
    kind = instruction.types()[-1]
    name = next(word for word in instruction.modifiers if word in operations)
    function, neutral = operations[name]
    write = writer(program, instruction.operands[0], kind)
    source, members = (
        reader(program, instruction.operands[1], kind),
        reader(program, instruction.operands[2], TYPES["u32"]),
    )
    info = np.iinfo(kind.dtype)
    start = {"min": info.max, "max": info.min}.get(name, neutral)

    def execute(block: Block, active: Active) -> None:
        expect_members(active, np.broadcast_to(members(block), block.shape))
        outside = np.array(start).astype(kind.dtype)
        values = np.where(active.mask, source(block), outside).reshape(-1, WARP)
        result = function.reduce(values, axis=1, dtype=kind.dtype)  # type: ignore[attr-defined]
        write(block, active, np.repeat(result, WARP))

    step.execute = execute


@builds("activemask")
def build_activemask(program: Program, instruction: Instruction, step: Step) -> None:
    write = writer(program, instruction.operands[0], TYPES["u32"])

    def execute(block: Block, active: Active) -> None:
        weights = np.uint64(1) << np.arange(WARP, dtype=np.uint64)
        write(block, active, np.repeat((active.by_warp * weights).sum(1).astype(np.uint32), WARP))

    step.execute = execute
