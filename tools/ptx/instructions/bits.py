"""Logic, shifts and bit fields (PTX ISA, "Logic and Shift Instructions", and of "Integer Arithmetic Instructions" those
on bits)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import PtxError
from ptx.instructions.elementwise import elementwise
from ptx.instructions.registry import builds
from ptx.operands import refuse
from ptx.source import Immediate, Instruction
from ptx.types import TYPES, UNSIGNED, Array

if TYPE_CHECKING:
    from ptx.program import Program, Step

_LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


@builds("and", "or", "xor", "not")
def build_logic(program: Program, instruction: Instruction, step: Step) -> None:
    kind = instruction.types()[-1]
    refuse(instruction, set())
    arguments = 1 if instruction.name == "not" else 2
    elementwise(program, instruction, step, kind, [kind] * arguments, _LOGIC[instruction.name])


@builds("lop3")
def build_lop3(program: Program, instruction: Instruction, step: Step) -> None:
    """Bit by bit, the one of the table that the bits of a, b and c (from high to low) name."""
    refuse(instruction, set())
    table = instruction.operands[-1]
    if not isinstance(table, Immediate):
        raise PtxError(f"expected a constant table, got {table}")
    b32 = TYPES["b32"]

    def lop3(a: Array, b: Array, c: Array, _: Array) -> Array:
        out = np.uint32(0)
        for row in range(8):
            if table.value >> row & 1:
                out = out | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return np.asarray(out)

    elementwise(program, instruction, step, b32, [b32] * 4, lop3)


@builds("shl", "shr")
def build_shift(program: Program, instruction: Instruction, step: Step) -> None:
    """By more than the width: 0, or copies of the sign."""
    kind = instruction.types()[-1]
    refuse(instruction, set())
    is_left = instruction.name == "shl"

    def shift(x: Array, amount: Array) -> Array:
        most = kind.dtype(kind.bits - 1)
        by = np.minimum(amount, np.uint32(kind.bits - 1)).astype(kind.dtype)
        beyond = x >> most if kind.kind == "s" and not is_left else kind.dtype(0)
        return np.where(np.asarray(amount) >= kind.bits, beyond, (x << by) if is_left else (x >> by)).astype(kind.dtype)

    elementwise(program, instruction, step, kind, [kind, TYPES["u32"]], shift)


@builds("shf")
def build_funnel(program: Program, instruction: Instruction, step: Step) -> None:
    """Shift of the 64 bits b:a; the upper (.l) or lower (.r) word of it."""
    refuse(instruction, {"l", "r", "wrap", "clamp"})
    is_left, wraps = "l" in instruction.modifiers, "wrap" in instruction.modifiers
    u32 = TYPES["u32"]

    def shift(a: Array, b: Array, amount: Array) -> Array:
        both = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | np.asarray(a).astype(np.uint64)
        by = (amount & np.uint32(31) if wraps else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        return ((both << by) >> np.uint64(32) if is_left else both >> by).astype(np.uint32)

    elementwise(program, instruction, step, u32, [u32] * 3, shift)


@builds("bfe")
def build_extract(program: Program, instruction: Instruction, step: Step) -> None:
    """`c` bits of a from bit b on; of .s types, extended by the highest of them that a has."""
    kind = instruction.types()[-1]
    refuse(instruction, set())
    u32, wide = TYPES["u32"], np.uint64

    def extract(a: Array, b: Array, c: Array) -> Array:
        position, length = b & np.uint32(255), c & np.uint32(255)
        bits = np.asarray(a).view(UNSIGNED[kind.bits]).astype(wide)
        top = np.minimum(position + length - np.uint32(1), np.uint32(kind.bits - 1)).astype(wide)
        sign = np.where(length == 0, wide(0), (bits >> top) & wide(1)) if kind.kind == "s" else wide(0)
        count = np.minimum(length, np.uint32(64)).astype(wide)
        mask = np.where(count >= 64, wide(2**64 - 1), (wide(1) << np.minimum(count, wide(63))) - wide(1))
        shifted = np.where(position >= 64, wide(0), bits >> np.minimum(position, np.uint32(63)).astype(wide))
        # Bits of the field that lie behind those of a are the sign's.
        there = np.maximum(kind.bits - position.astype(np.int64), 0).astype(wide)
        present = np.where(there >= 64, wide(2**64 - 1), (wide(1) << np.minimum(there, wide(63))) - wide(1))
        value = (shifted & mask & present) | np.where(sign == 1, ~(mask & present), wide(0))
        return value.astype(UNSIGNED[kind.bits]).view(kind.dtype)

    elementwise(program, instruction, step, kind, [kind, u32, u32], extract)


@builds("bfi")
def build_insert(program: Program, instruction: Instruction, step: Step) -> None:
    """The lowest d bits of a in the place of those of b from bit c on."""
    kind = instruction.types()[-1]
    refuse(instruction, set())
    u32, wide = TYPES["u32"], np.uint64

    def insert(a: Array, b: Array, c: Array, d: Array) -> Array:
        position = np.minimum(c & np.uint32(255), np.uint32(64)).astype(wide)
        length = np.minimum(d & np.uint32(255), np.uint32(64)).astype(wide)
        ones = np.where(length >= 64, wide(2**64 - 1), (wide(1) << np.minimum(length, wide(63))) - wide(1))
        by = np.minimum(position, wide(63))
        mask = np.where(position >= 64, wide(0), ones << by)
        moved = np.where(position >= 64, wide(0), np.asarray(a).astype(wide) << by)
        return ((np.asarray(b).astype(wide) & ~mask) | (moved & mask)).astype(kind.dtype)

    elementwise(program, instruction, step, kind, [kind, kind, u32, u32], insert)


@builds("popc", "clz", "brev", "bfind")
def build_count(program: Program, instruction: Instruction, step: Step) -> None:
    kind = instruction.types()[-1]
    refuse(instruction, {"shiftamt"})
    bits, wide = kind.bits, np.uint64

    def highest(x: Array) -> Array:
        """Number of the highest bit that is set, -1 for none."""
        x = np.asarray(x).astype(wide)
        found = np.full(x.shape, -1, np.int64)
        for i in range(bits):
            found = np.where((x >> wide(i)) & wide(1) == 1, i, found)
        return found

    def bfind(x: Array) -> Array:
        if kind.kind == "s":
            x = np.where(np.asarray(x) < 0, ~x, x).view(UNSIGNED[bits])
        found = highest(x)
        if "shiftamt" in instruction.modifiers:
            found = np.where(found < 0, -1, bits - 1 - found)
        return found.astype(np.int32).view(np.uint32)

    def reverse(x: Array) -> Array:
        x, out = np.asarray(x).astype(wide), wide(0)
        for i in range(bits):
            out = out | (((x >> wide(i)) & wide(1)) << wide(bits - 1 - i))
        return np.asarray(out).astype(kind.dtype)

    functions: dict[str, Callable[[Array], Array]] = {
        "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
        "clz": lambda x: (bits - 1 - highest(x)).astype(np.uint32),
        "brev": reverse,
        "bfind": bfind,
    }
    result = kind if instruction.name == "brev" else TYPES["u32"]
    elementwise(program, instruction, step, result, [kind], functions[instruction.name])


@builds("prmt")
def build_permute(program: Program, instruction: Instruction, step: Step) -> None:
    """Each byte one of the eight of b:a, by a selector of four bits, or its sign (the selector's highest bit)."""
    refuse(instruction, set())  # other modes than that without a name
    b32 = TYPES["b32"]

    def permute(a: Array, b: Array, selectors: Array) -> Array:
        both = np.asarray(a).astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
        out = np.uint32(0)
        for i in range(4):
            selector = (selectors >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((selector & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(selector & np.uint32(8), sign, byte)
            out = out | (byte.astype(np.uint32) << np.uint32(8 * i))
        return np.asarray(out)

    elementwise(program, instruction, step, b32, [b32] * 3, permute)
