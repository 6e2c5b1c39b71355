"""Device functions that several kernels share: conversions, and the -inf of an empty softmax."""

from __future__ import annotations

from teco_kernels.triton_kernels._language import INTERPRETED, jit, tl


@jit
def to_float(x):
    """fp32 of any floating element."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@jit
def from_float(x, dtype: tl.constexpr):
    """fp32 rounded to the nearest of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@jit
def load_float(pointers, mask):
    """fp32 of the elements there; 0 where the mask is not set."""
    return to_float(tl.load(pointers, mask=mask, other=0.0))


@jit
def store_float(pointers, x, mask):
    """Store fp32 rounded to the dtype of the memory."""
    tl.store(pointers, from_float(x, pointers.dtype.element_ty), mask=mask)


@jit
def operand(x):
    """An element as `tl.dot` may take it: bf16 products go wrong in the interpreter, there they are made in fp32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return to_float(x)
    return x


@jit
def round_to_integer(x):
    """fp32 to the nearest integer, ties to even, for magnitudes below 2**22: adding 1.5 * 2**23 leaves no fraction."""
    return (x + 12582912.0) - 12582912.0


@jit
def finite_or_zero(largest):
    """What to subtract from numbers of which this is the largest: with nothing but -inf there is none to shift by."""
    return tl.where(largest == -float("inf"), 0.0, largest)
