"""Operands as functions: what reads a value for all threads of a block, and what writes one for some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.active import WARP, Active
from ptx.errors import PtxError
from ptx.source import SINK, Address, Immediate, Instruction, Negated, Operand, Register, Symbol, Vector, immediate_bits
from ptx.types import TYPES, UNSIGNED, Array, Type, as_bits

if TYPE_CHECKING:
    from ptx.block import Block
    from ptx.program import Program

Read = Callable[["Block"], Array]
Write = Callable[["Block", Active, Array], None]
Execute = Callable[["Block", Active], None]

#: Where generic addresses of shared and of local memory begin; below lies global memory.
SHARED_WINDOW, LOCAL_WINDOW = 1 << 60, 1 << 61


def reader(program: Program, operand: Operand, kind: Type) -> Read:
    """Reads an operand as values of a type: an array of its dtype [threads], or one value for all."""
    if isinstance(operand, Immediate) and kind.kind == "pred":
        truth = np.bool_(operand.value != 0)
        return lambda block: truth
    if isinstance(operand, Immediate):
        constant = np.array(immediate_bits(operand, kind.bits)).view(kind.dtype)[()]
        return lambda block: constant
    if isinstance(operand, Symbol):
        address = np.array(program.address_of(operand.name), np.uint64).astype(UNSIGNED[kind.bits]).view(kind.dtype)[()]
        return lambda block: address
    if kind.kind == "pred":
        return _predicate(program, operand)
    if not isinstance(operand, Register):
        raise PtxError(f"expected a register or a constant, got {operand}")
    name, dtype = operand.name, kind.dtype
    if name.startswith("%") and name.split(".")[0] in _SPECIAL:
        read = _special(name)
        return lambda block: read(block).astype(UNSIGNED[kind.bits]).view(dtype)
    declared = program.type_of(name)
    if declared.kind == "pred" or declared.bits < kind.bits:
        raise PtxError(f"expected a register of {kind.bits} bits, got {name} of .{declared.name}")
    if declared.bits == kind.bits:
        return lambda block: block.register(name).view(dtype)
    narrow = UNSIGNED[kind.bits]
    return lambda block: block.register(name).astype(narrow).view(dtype)


def _predicate(program: Program, operand: Operand) -> Read:
    inner = operand.operand if isinstance(operand, Negated) else operand
    if not isinstance(inner, Register) or program.type_of(inner.name).kind != "pred":
        raise PtxError(f"expected a predicate, got {operand}")
    name = inner.name
    if isinstance(operand, Negated):
        return lambda block: ~block.register(name)
    return lambda block: block.register(name)


def writer(program: Program, operand: Operand, kind: Type) -> Write:
    """Writes values of a type to a register: extended where it is wider, by the sign if the type has one."""
    if operand == SINK:
        return lambda block, active, values: None
    if not isinstance(operand, Register):
        raise PtxError(f"expected a register, got {operand}")
    name, declared = operand.name, program.type_of(operand.name)
    if (declared.kind == "pred") != (kind.kind == "pred") or declared.bits < kind.bits:
        raise PtxError(f"expected a register for .{kind.name}, got {name} of .{declared.name}")
    if declared.bits == kind.bits:
        return lambda block, active, values: block.set_register(name, as_bits(np.asarray(values)), active)
    wide = UNSIGNED[declared.bits]
    if kind.kind == "s":
        signed = TYPES[f"s{declared.bits}"].dtype
        return lambda block, active, values: block.set_register(
            name, as_bits(np.asarray(values).astype(signed)), active
        )
    return lambda block, active, values: block.set_register(name, as_bits(np.asarray(values)).astype(wide), active)


def readers(program: Program, operand: Operand, kind: Type) -> list[Read]:
    """Of a vector, one for each element; of another operand, one."""
    elements = operand.elements if isinstance(operand, Vector) else (operand,)
    return [reader(program, element, kind) for element in elements]


def writers(program: Program, operand: Operand, kind: Type) -> list[Write]:
    """Likewise."""
    elements = operand.elements if isinstance(operand, Vector) else (operand,)
    return [writer(program, element, kind) for element in elements]


def address_reader(program: Program, operand: Operand) -> Read:
    """Reads an address [base + offset] as uint64 [threads]."""
    if not isinstance(operand, Address):
        raise PtxError(f"expected an address, got {operand}")
    offset = np.uint64(operand.offset & (2**64 - 1))
    bits = 64
    if isinstance(operand.base, Register) and program.type_of(operand.base.name).bits == 32:
        bits = 32
    base = reader(program, operand.base, TYPES[f"u{bits}"])
    return lambda block: np.broadcast_to(np.asarray(base(block)).astype(np.uint64) + offset, block.shape)


_SPECIAL = {
    "%tid",
    "%ntid",
    "%ctaid",
    "%nctaid",
    "%laneid",
    "%warpid",
    "%nwarpid",
    "%lanemask_eq",
    "%lanemask_lt",
    "%lanemask_le",
    "%lanemask_gt",
    "%lanemask_ge",
    "%dynamic_smem_size",
}


def _special(name: str) -> Read:
    """A special register, as uint32 [threads]."""
    base, _, axis = name.partition(".")
    index = "xyz".find(axis) if axis else -1
    if base == "%tid":
        return lambda block: block.thread_index[index]
    if base in ("%ntid", "%ctaid", "%nctaid"):
        field = {"%ntid": "threads", "%ctaid": "index", "%nctaid": "grid"}[base]
        return lambda block: np.full(block.shape, getattr(block, field)[index], np.uint32)
    if base == "%dynamic_smem_size":
        return lambda block: np.full(block.shape, block.dynamic_shared, np.uint32)
    lanes = np.arange(WARP, dtype=np.uint64)
    one = np.uint64(1)
    of_lane = {
        "%laneid": lanes,
        "%lanemask_eq": one << lanes,
        "%lanemask_lt": (one << lanes) - one,
        "%lanemask_le": (one << (lanes + one)) - one,
        "%lanemask_gt": np.uint64(0xFFFFFFFF) & ~((one << (lanes + one)) - one),
        "%lanemask_ge": np.uint64(0xFFFFFFFF) & ~((one << lanes) - one),
    }
    if base in of_lane:
        values = of_lane[base].astype(np.uint32)
        return lambda block: np.tile(values, block.shape[0] // WARP)
    if base == "%warpid":
        return lambda block: (np.arange(block.shape[0]) // WARP).astype(np.uint32)
    return lambda block: np.full(block.shape, block.shape[0] // WARP, np.uint32)


def is_special(operand: Operand) -> bool:
    """Whether it is a register that the machine fills."""
    return isinstance(operand, Register) and operand.name.split(".")[0] in _SPECIAL


def expect_operands(instruction: Instruction, *counts: int) -> None:
    """Raise unless it has one of these numbers of operands."""
    if len(instruction.operands) not in counts:
        raise PtxError(f"expected {' or '.join(map(str, counts))} operands, got {len(instruction.operands)}")


def refuse(instruction: Instruction, known: set[str]) -> None:
    """Raise for a modifier that is neither a type nor one of these."""
    for word in instruction.modifiers:
        if word not in TYPES and word not in known:
            raise PtxError(f"an instruction that is not known to the interpreter: .{word}")
