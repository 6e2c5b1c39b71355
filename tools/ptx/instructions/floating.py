"""Floating-point arithmetic (PTX ISA, "Floating Point Instructions", "Half Precision Floating Point Instructions").

Results are rounded once, to the nearest. Approximations (.approx, .full) are made as well as float64 allows, which lies
within the errors that the ISA permits them; a GPU has other last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import PtxError
from ptx.floats import decode, encode, encode_toward, flush, fused_multiply_add, largest, saturate, smallest
from ptx.instructions.elementwise import elementwise
from ptx.instructions.registry import builds
from ptx.operands import refuse
from ptx.source import Instruction
from ptx.types import TYPES, Array, Type, as_bits, halves, joined

if TYPE_CHECKING:
    from ptx.program import Program, Step

_KNOWN = {"rn", "rz", "rm", "rp", "ftz", "sat", "approx", "full", "NaN"}

# Of numbers of a type's own; float32 for 16 bits, where one more rounding changes nothing.
_PLAIN: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "sqrt": np.sqrt,
}
# Of float32, such that the result can be rounded in any way.
_EXACT: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: fused_multiply_add(a, np.float32(1), b),
    "sub": lambda a, b: fused_multiply_add(a, np.float32(1), -b),
    "mul": lambda a, b: a.astype(np.float64) * b.astype(np.float64),
}
# Through float64.
_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "rcp": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def _direction(instruction: Instruction) -> str:
    """The rounding, where it is not to the nearest."""
    return next((word for word in instruction.modifiers if word in ("rz", "rm", "rp")), "")


def _arithmetic(instruction: Instruction, kind: Type) -> Callable[..., Array]:
    """On numbers, before they are rounded to the type."""
    name, keep_nan = instruction.name, "NaN" in instruction.modifiers
    if name in ("fma", "mad"):
        if kind.bits == 64:
            raise PtxError("fma of .f64 is not known to the interpreter")
        return fused_multiply_add
    if _direction(instruction):
        if kind.name != "f32" or name not in _EXACT:
            raise PtxError(f"a rounding that is not known to the interpreter here: .{_direction(instruction)}")
        return _EXACT[name]
    if name in _PLAIN:
        return _PLAIN[name]
    if name in _FUNCTIONS:
        function = _FUNCTIONS[name]
        return lambda x: function(np.asarray(x).astype(np.float64))
    return {"min": lambda a, b: smallest(a, b, keep_nan), "max": lambda a, b: largest(a, b, keep_nan)}[name]


def _on_bits(function: Callable[..., Array], kind: Type, instruction: Instruction) -> Callable[..., Array]:
    """The same on values as registers hold them."""
    ftz, sat, direction = "ftz" in instruction.modifiers, "sat" in instruction.modifiers, _direction(instruction)

    def compute(*values: Array) -> Array:
        numbers = [decode(np.asarray(value), kind) for value in values]
        if ftz:
            numbers = [flush(n) for n in numbers]
        result = np.asarray(function(*numbers))
        if sat:
            result = saturate(result)
        result = encode_toward(result, kind, direction) if direction else encode(result, kind)
        return flush(result) if ftz and kind.name == "f32" else result

    return compute


def _each_half(function: Callable[..., Array], kind: Type) -> Callable[..., Array]:
    """A function on elements of 16 bits for both halves of a word."""

    def compute(*words: Array) -> Array:
        dtype = kind.element.dtype
        pairs = [halves(np.atleast_1d(w)).view(dtype) for w in words]
        return joined(as_bits(np.asarray(function(*pairs))))

    return compute


def build_float(program: Program, instruction: Instruction, step: Step) -> None:
    """Arithmetic on a floating type; what only turns a sign changes no NaN."""
    kind = instruction.types()[-1]
    refuse(instruction, _KNOWN)
    element = kind.element
    if instruction.name in ("abs", "neg"):
        sign = np.array(1 << (element.bits - 1), f"u{element.bytes}")[()]
        is_abs = instruction.name == "abs"

        def function(x: Array) -> Array:
            bits = as_bits(np.asarray(x))
            bits = bits & ~sign if is_abs else bits ^ sign
            values = bits.view(element.dtype)
            return flush(values) if "ftz" in instruction.modifiers and element.name == "f32" else values

    else:
        function = _on_bits(_arithmetic(instruction, element), element, instruction)
    if kind.is_packed:
        function = _each_half(function, kind)
    arguments = 3 if instruction.name in ("fma", "mad") else 2 if instruction.name in _TWO else 1
    elementwise(program, instruction, step, kind, [kind] * arguments, function)


_TWO = {"add", "sub", "mul", "div", "min", "max"}


@builds("fma", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def build_function(program: Program, instruction: Instruction, step: Step) -> None:
    build_float(program, instruction, step)


@builds("copysign")
def build_copysign(program: Program, instruction: Instruction, step: Step) -> None:
    """The magnitude of b with the sign of a."""
    kind = instruction.types()[-1]
    refuse(instruction, set())
    elementwise(program, instruction, step, kind, [kind, kind], lambda a, b: np.copysign(b, a))


@builds("testp")
def build_testp(program: Program, instruction: Instruction, step: Step) -> None:
    kind = instruction.types()[-1]
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
    }
    refuse(instruction, set(tests))
    elementwise(program, instruction, step, TYPES["pred"], [kind], tests[instruction.modifiers[0]])
