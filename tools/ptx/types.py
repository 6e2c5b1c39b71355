"""Types of PTX instructions, and the numpy arrays that hold their values: bits, of the width of a type."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.errors import PtxError

Array = np.ndarray

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}


@dataclass(frozen=True)
class Type:
    """A type that an instruction names.

    Attributes
    ----------
    name : str
        As PTX spells it: "u32", "bf16x2".
    kind : str
        "u", "s", "f", "bf" (bfloat16), "tf" (tf32), "b" (untyped bits) or "pred".
    bits : int
        Of the whole, both elements of a packed type included.
    is_packed : bool
        Two elements of 16 bits, the first one in the lower half.
    """

    name: str
    kind: str
    bits: int
    is_packed: bool = False

    @property
    def bytes(self) -> int:
        """Of it in memory."""
        return self.bits // 8

    @property
    def dtype(self) -> type:
        """Of an array of its values. bf16, tf32, packed and untyped values stay bits."""
        if self.kind == "pred":
            return np.bool_
        if self.is_packed:
            return np.uint32
        return {"s": _SIGNED, "f": _FLOATS}.get(self.kind, UNSIGNED)[self.bits]

    @property
    def element(self) -> Type:
        """What a packed type is made of; of another, itself."""
        return TYPES[self.name.removesuffix("x2")]

    @property
    def is_float(self) -> bool:
        return self.kind in ("f", "bf", "tf")


def _types() -> dict[str, Type]:
    found = [Type(f"{kind}{bits}", kind, bits) for kind in "usb" for bits in (8, 16, 32, 64)]
    found += [Type(f"f{bits}", "f", bits) for bits in (16, 32, 64)]
    found += [Type("bf16", "bf", 16), Type("tf32", "tf", 32), Type("pred", "pred", 1)]
    found += [Type("f16x2", "f", 32, True), Type("bf16x2", "bf", 32, True), Type("u16x2", "u", 32, True)]
    found += [Type("s16x2", "s", 32, True)]
    return {t.name: t for t in found}


TYPES = _types()


def type_of(name: str) -> Type:
    """The type of this name."""
    if name not in TYPES:
        raise PtxError(f"expected a type that is known, got .{name}")
    return TYPES[name]


def as_bits(values: Array) -> Array:
    """The same memory as unsigned integers."""
    return values if values.dtype == np.bool_ else values.view(UNSIGNED[8 * values.dtype.itemsize])


def halves(words: Array) -> Array:
    """32-bit words [...] as their halves [..., 2], the lower one first."""
    return np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)


def joined(pairs: Array) -> Array:
    """Halves [..., 2] of 16 bits as words [...]."""
    return np.ascontiguousarray(pairs).view(np.uint32).reshape(pairs.shape[:-1])
