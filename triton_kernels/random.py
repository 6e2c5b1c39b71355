"""Random numbers, and draws in proportion to weights that are integers: numbers and rule of csrc/cpu/random.h."""

from __future__ import annotations

from teco_kernels.triton_kernels._language import jit, tl


@jit
def random_bits(seed, offset, STREAM: tl.constexpr):
    """Two uint64 of Philox4x32-10, counter (offset, STREAM), key `seed`; int64 arguments of any shape."""
    zero = (offset * 0).to(tl.uint32)
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1, c2, c3 = tl.philox(seed.to(tl.uint64, bitcast=True), low, high, zero + STREAM, zero)
    return (c1.to(tl.uint64) << 32) | c0.to(tl.uint64), (c3.to(tl.uint64) << 32) | c2.to(tl.uint64)


@jit
def to_units(weight):
    """fp32 weights in units of 2^-40, int64: adding 2^52 leaves the rounded integer in the low bits of an fp64."""
    shifted = weight.to(tl.float64) * 1099511627776.0 + 4503599627370496.0
    return shifted.to(tl.int64, bitcast=True) - 0x4330000000000000


@jit
def draw_below(total, bits):
    """A uniform integer below `total`, of 64 random bits."""
    return tl.umulhi(total.to(tl.uint64, bitcast=True), bits).to(tl.int64, bitcast=True)
