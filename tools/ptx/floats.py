"""Floating-point arithmetic with one rounding: bf16, fused multiply-adds, NaN as a GPU leaves it."""

from __future__ import annotations

import numpy as np

from ptx.errors import PtxError
from ptx.types import Array, Type, as_bits

#: What arithmetic makes of NaN. PTX keeps no payloads.
CANONICAL_NAN = {16: np.uint16(0x7FFF), 32: np.uint32(0x7FFFFFFF), 64: np.uint64(0x7FF8000000000000)}


def decode(values: Array, kind: Type) -> Array:
    """Values of a floating type as numbers that numpy computes with; of 16 bits, as float32."""
    if kind.kind == "bf":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind.kind == "tf":  # the low bits are not looked at
        return (values & np.uint32(0xFFFFE000)).view(np.float32)
    return values.astype(np.float32) if kind.bits == 16 else values


def encode(numbers: Array, kind: Type) -> Array:
    """Numbers rounded to the nearest of a floating type, ties to even; NaN becomes the canonical one."""
    if kind.kind == "tf":
        raise PtxError("tf32 is no result of arithmetic")
    if kind.kind == "bf":
        bits = (to_float32(numbers) if numbers.dtype == np.float64 else numbers).view(np.uint32)
        bits = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
            np.uint16
        )
        return np.where(np.isnan(numbers), CANONICAL_NAN[16], bits)
    rounded = numbers.astype(kind.dtype)
    if not np.isnan(rounded).any():
        return rounded
    bits = rounded.view({16: np.uint16, 32: np.uint32, 64: np.uint64}[kind.bits])
    return np.where(np.isnan(rounded), CANONICAL_NAN[kind.bits], bits).view(kind.dtype)


def encode_toward(numbers: Array, kind: Type, direction: str) -> Array:
    """Numbers rounded to a floating type towards zero ("rz"), downwards ("rm") or upwards ("rp")."""
    nearest = encode(numbers, kind)
    rounded, bits = decode(nearest, kind), as_bits(nearest)
    is_negative = np.signbit(numbers)
    wrong = {"rz": abs(rounded) > abs(numbers), "rm": rounded > numbers, "rp": rounded < numbers}[direction]
    grows = {"rz": np.False_, "rm": is_negative, "rp": ~is_negative}[direction]  # in magnitude
    one = bits.dtype.type(1)
    return np.where(wrong, np.where(grows, bits + one, bits - one), bits).view(nearest.dtype)


def round_to_odd(numbers: Array, error: Array) -> Array:
    """float64 sums whose rounding error is known: of the two neighbours of the exact value, the odd one.

    Such a sum can be rounded once more, to a type of half as many bits, as if it had been exact.
    """
    bits = numbers.view(np.int64)
    neighbour = np.nextafter(numbers, np.where(error > 0, np.inf, -np.inf))
    is_even = (bits & 1) == 0
    return np.where((error != 0) & is_even & np.isfinite(numbers), neighbour, numbers)


def to_float32(numbers: Array) -> Array:
    """float64 as float32 that can be rounded once more: to the odd neighbour."""
    nearest = numbers.astype(np.float32)
    error = numbers - nearest.astype(np.float64)
    neighbour = np.nextafter(nearest, np.where(error > 0, np.float32(np.inf), np.float32(-np.inf)))
    is_even = (nearest.view(np.uint32) & np.uint32(1)) == 0
    return np.where((error != 0) & is_even & np.isfinite(nearest), neighbour, nearest)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 as float64 that is still to be rounded, once: products of float32 are exact there."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # Knuth's two-sum
    return round_to_odd(total, np.where(np.isfinite(total), error, 0.0))


def flush(numbers: Array) -> Array:
    """Subnormal float32 as zeros of the same sign (.ftz)."""
    return np.where(np.abs(numbers) < np.float32(2.0**-126), np.copysign(np.float32(0), numbers), numbers)


def saturate(numbers: Array) -> Array:
    """Clamped to 0 ... 1, NaN to 0 (.sat)."""
    return np.where(np.isnan(numbers), numbers.dtype.type(0), np.clip(numbers, 0, 1)).astype(numbers.dtype)


def smallest(a: Array, b: Array, keep_nan: bool) -> Array:
    """min: of a number and NaN the number, unless `keep_nan`; -0 is below +0."""
    least = np.fmin(a, b)
    least = np.where((a == b) & np.signbit(b), b, np.where(a == b, a, least))
    return np.where(np.isnan(a) | np.isnan(b), least.dtype.type(np.nan), least) if keep_nan else least


def largest(a: Array, b: Array, keep_nan: bool) -> Array:
    """max, likewise."""
    return -smallest(-a, -b, keep_nan)
