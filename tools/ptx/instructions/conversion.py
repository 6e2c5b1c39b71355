"""cvt (PTX ISA, "Data Movement and Conversion Instructions": cvt)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import PtxError
from ptx.floats import CANONICAL_NAN, decode, encode, encode_toward, flush, saturate
from ptx.instructions.elementwise import elementwise
from ptx.instructions.registry import builds
from ptx.operands import refuse
from ptx.source import Instruction
from ptx.types import TYPES, UNSIGNED, Array, Type, as_bits, joined

if TYPE_CHECKING:
    from ptx.program import Program, Step

_ROUND: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _float_to_integer(source: Type, result: Type, rounding: str) -> Callable[[Array], Array]:
    """Clamped to the range of the result; NaN gives 0, but between f64 or 64 bits the highest bit alone."""
    info = np.iinfo(result.dtype)
    has_far_nan = source.bits == 64 or result.bits == 64
    of_nan = np.array(1 << (result.bits - 1), UNSIGNED[result.bits]).view(result.dtype)[()] if has_far_nan else 0

    def convert(x: Array) -> Array:
        number = _ROUND[rounding](decode(np.asarray(x), source).astype(np.float64))
        is_nan, low, high = np.isnan(number), number < float(info.min), number >= float(info.max)
        inside = np.where(is_nan | low | high, 0.0, number)
        clamped = np.where(high, info.max, np.where(low, info.min, inside.astype(result.dtype)))
        return np.where(is_nan, of_nan, clamped).astype(result.dtype)

    return convert


def _integer_to_integer(result: Type, sat: bool) -> Callable[[Array], Array]:
    info = np.iinfo(result.dtype)
    if not sat:
        return lambda x: np.asarray(x).astype(result.dtype)

    def convert(x: Array) -> Array:
        x = np.asarray(x)
        wide = np.iinfo(x.dtype)
        low, high = max(info.min, wide.min), min(info.max, wide.max)
        return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(result.dtype)

    return convert


def _tf32(x: Array) -> Array:
    """.rna: to the nearest of 10 bits of mantissa, ties away from zero; the low bits are zeros."""
    bits = np.asarray(x).view(np.uint32)
    rounded = np.where(np.isinf(x), bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    return np.where(np.isnan(x), CANONICAL_NAN[32], rounded)


def _float_to_float(source: Type, result: Type, words: tuple[str, ...]) -> Callable[[Array], Array]:
    def convert(x: Array) -> Array:
        number = decode(np.asarray(x), source)
        if "ftz" in words and source.name == "f32":
            number = flush(number)
        for name, function in _ROUND.items():
            if name in words:
                number = function(number)
        if "sat" in words:
            number = saturate(number)
        if "relu" in words:
            number = np.where(number > 0, number, np.where(np.isnan(number), number, number.dtype.type(0)))
        if "rz" in words:
            return encode_toward(number, result, "rz")
        if result.bits > source.bits and result.kind == "f":
            return np.asarray(number).astype(result.dtype)  # exact
        value = encode(number, result)
        return flush(value) if "ftz" in words and result.name == "f32" else value

    return convert


@builds("cvt")
def build_cvt(program: Program, instruction: Instruction, step: Step) -> None:
    words = instruction.modifiers
    refuse(instruction, {"rn", "rz", "rna", "ftz", "sat", "relu", *_ROUND})
    result, source = instruction.types()
    if result.name == "tf32":
        if source.name != "f32" or "rna" not in words:
            raise PtxError("expected cvt.rna.tf32.f32")
        return elementwise(program, instruction, step, TYPES["b32"], [source], _tf32)
    if result.is_packed:  # the first source becomes the upper half
        if source.name != "f32":
            raise PtxError(f"expected sources of .f32, got .{source.name}")
        narrow = _float_to_float(source, result.element, words)

        def pack(a: Array, b: Array) -> Array:
            low, high = np.broadcast_arrays(as_bits(np.asarray(narrow(b))), as_bits(np.asarray(narrow(a))))
            return joined(np.stack([low, high], -1))

        return elementwise(program, instruction, step, TYPES["b32"], [source, source], pack)
    if source.is_float and result.is_float:
        function = _float_to_float(source, result, words)
    elif source.is_float:
        rounding = next((word for word in words if word in _ROUND), None)
        if rounding is None:
            raise PtxError("expected a rounding to integers: .rni, .rzi, .rmi or .rpi")
        function = _float_to_integer(source, result, rounding)
    elif result.is_float:
        if "rn" not in words:
            raise PtxError("expected .rn from an integer to a float")
        if result.kind == "bf" or (result.bits == 16 and source.bits == 64):
            raise PtxError(f"an instruction that is not known to the interpreter: to .{result.name}")

        def function(x: Array) -> Array:
            return np.asarray(x).astype(np.float64 if result.bits == 16 else result.dtype).astype(result.dtype)

    else:
        function = _integer_to_integer(result, "sat" in words)
    elementwise(program, instruction, step, result, [source], function)
