"""Integer arithmetic (PTX ISA, "Integer Arithmetic Instructions"); names it shares with floating ones lead here too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.errors import PtxError
from ptx.instructions.elementwise import elementwise
from ptx.instructions.floating import build_float
from ptx.instructions.registry import builds
from ptx.operands import refuse
from ptx.source import Instruction
from ptx.types import TYPES, UNSIGNED, Array, Type

if TYPE_CHECKING:
    from ptx.program import Program, Step


def _wider(kind: Type) -> Type:
    return TYPES[f"{kind.kind}{2 * kind.bits}"]


def _high(a: Array, b: Array, kind: Type) -> Array:
    """The upper half of the product."""
    if kind.bits < 64:
        wide = _wider(kind)
        product = np.asarray(a).astype(wide.dtype) * np.asarray(b).astype(wide.dtype)
        return (product >> wide.dtype(kind.bits)).astype(kind.dtype)
    x, y = np.broadcast_arrays(a, b)
    products = [(int(p) * int(q) >> 64) & (2**64 - 1) for p, q in zip(x.ravel(), y.ravel(), strict=True)]
    return np.array(products, np.uint64).view(kind.dtype).reshape(x.shape)


def _divide(a: Array, b: Array, kind: Type) -> tuple[Array, Array]:
    """Quotient, rounded towards zero, and remainder. By zero, both are what the machine leaves: all ones, and a."""
    is_zero = np.asarray(b) == 0
    divisor = np.where(is_zero, kind.dtype(1), b)
    quotient = np.floor_divide(a, divisor)
    if kind.kind == "s":
        has_rest = quotient * divisor != a
        quotient = np.where(has_rest & ((np.asarray(a) < 0) != (divisor < 0)), quotient + kind.dtype(1), quotient)
    remainder = a - quotient * divisor
    ones = kind.dtype(-1) if kind.kind == "s" else kind.dtype((1 << kind.bits) - 1)
    return np.where(is_zero, ones, quotient), np.where(is_zero, a, remainder)


def _saturated(function: Callable[..., Any], kind: Type) -> Callable[..., Array]:
    info = np.iinfo(kind.dtype)

    def clamped(*values: Array) -> Array:
        exact = function(*(np.asarray(value).astype(np.int64) for value in values))
        return np.clip(exact, info.min, info.max).astype(kind.dtype)

    return clamped


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": np.minimum,
    "max": np.maximum,
}


@builds("add", "sub", "min", "max")
def build_binary(program: Program, instruction: Instruction, step: Step) -> None:
    kind = instruction.types()[-1]
    if kind.is_float:
        return build_float(program, instruction, step)
    refuse(instruction, {"sat"})
    function = _BINARY[instruction.name]
    if "sat" in instruction.modifiers:
        if kind.name != "s32":
            raise PtxError(f"expected .sat of .s32, got .{kind.name}")
        function = _saturated(function, kind)
    if kind.is_packed:
        raise PtxError(f"a type that is not known to the interpreter here: .{kind.name}")
    elementwise(program, instruction, step, kind, [kind, kind], function)


@builds("mul", "mad")
def build_mul(program: Program, instruction: Instruction, step: Step) -> None:
    kind = instruction.types()[-1]
    if kind.is_float:
        return build_float(program, instruction, step)
    refuse(instruction, {"lo", "hi", "wide"})
    result = _wider(kind) if "wide" in instruction.modifiers else kind
    if "wide" in instruction.modifiers:

        def product(a: Array, b: Array) -> Array:
            return np.asarray(a).astype(result.dtype) * np.asarray(b).astype(result.dtype)

    elif "hi" in instruction.modifiers:

        def product(a: Array, b: Array) -> Array:
            return _high(a, b, kind)

    elif "lo" in instruction.modifiers:

        def product(a: Array, b: Array) -> Array:
            return a * b

    else:
        raise PtxError("expected .lo, .hi or .wide")
    if instruction.name == "mul":
        elementwise(program, instruction, step, result, [kind, kind], product)
    else:
        elementwise(program, instruction, step, result, [kind, kind, result], lambda a, b, c: product(a, b) + c)


@builds("div", "rem")
def build_div(program: Program, instruction: Instruction, step: Step) -> None:
    kind = instruction.types()[-1]
    if kind.is_float:
        return build_float(program, instruction, step)
    refuse(instruction, set())
    which = 0 if instruction.name == "div" else 1
    elementwise(program, instruction, step, kind, [kind, kind], lambda a, b: _divide(a, b, kind)[which])


@builds("abs", "neg")
def build_unary(program: Program, instruction: Instruction, step: Step) -> None:
    kind = instruction.types()[-1]
    if kind.is_float:
        return build_float(program, instruction, step)
    refuse(instruction, set())
    elementwise(program, instruction, step, kind, [kind], np.abs if instruction.name == "abs" else np.negative)


@builds("dp4a", "dp2a")
def build_dot(program: Program, instruction: Instruction, step: Step) -> None:
    """Bytes of a against bytes of b, or for dp2a halves of a against two bytes of b (.lo, .hi), and c."""
    first, second = instruction.types()
    refuse(instruction, {"lo", "hi"})
    is_signed = "s" in (first.kind, second.kind)
    result = TYPES["s32" if is_signed else "u32"]

    def parts(words: Array, kind: Type, bits: int) -> Array:
        dtype = TYPES[f"{kind.kind}{bits}"].dtype
        return np.ascontiguousarray(np.atleast_1d(words)).view(dtype).reshape(-1, 32 // bits).astype(np.int64)

    def dot(a: Array, b: Array, c: Array) -> Array:
        if instruction.name == "dp4a":
            products = parts(a, first, 8) * parts(b, second, 8)
        else:
            low = 2 if "hi" in instruction.modifiers else 0
            products = parts(a, first, 16) * parts(b, second, 8)[:, low : low + 2]
        return (products.sum(1) + np.asarray(c).astype(np.int64)).astype(result.dtype)

    elementwise(program, instruction, step, result, [first, second, result], dot)


@builds("sad")
def build_sad(program: Program, instruction: Instruction, step: Step) -> None:
    """c + |a - b|"""
    kind = instruction.types()[-1]
    refuse(instruction, set())

    def sad(a: Array, b: Array, c: Array) -> Array:
        distance = np.maximum(a, b).astype(UNSIGNED[kind.bits]) - np.minimum(a, b).astype(UNSIGNED[kind.bits])
        return c + distance.astype(kind.dtype)

    elementwise(program, instruction, step, kind, [kind, kind, kind], sad)
