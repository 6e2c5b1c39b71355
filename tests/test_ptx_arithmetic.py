"""The PTX interpreter's arithmetic against the definitions of the PTX ISA; each test names the section."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx_fragment import run

RANDOM = np.random.default_rng(0)
U32 = RANDOM.integers(0, 2**32, 64, np.uint32)
V32 = RANDOM.integers(0, 2**32, 64, np.uint32)
EDGES_32 = np.array([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF], np.uint32)
A32, B32 = (x.ravel() for x in np.meshgrid(EDGES_32, EDGES_32))

_TINY = 2.0**-149
FLOATS = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        1.5,
        _TINY,
        -_TINY,
        3 * 2.0 ** (-127),
        2.0 ** (-126),
        0.1,
        3e38,
        -3e38,
        1e-30,
        np.inf,
        -np.inf,
        np.nan,
        65504.0,
        65519.99,
        65520.0,
        2.0 ** (-24),
        2.0 ** (-25),
        1.0 + 2.0 ** (-11),
        1.0 + 3 * 2.0 ** (-11),
        1 + 2.0 ** (-8),
    ],
    np.float32,
)
FA, FB = (np.ascontiguousarray(x.ravel()) for x in np.meshgrid(FLOATS, FLOATS))


def signed(x: np.ndarray) -> list[int]:
    return x.view(f"i{x.dtype.itemsize}").tolist()


def same_floats(out: np.ndarray, expected: np.ndarray) -> bool:
    """Bit for bit; NaN is any NaN."""
    nan = np.isnan(expected)
    bits = f"u{out.dtype.itemsize}"
    return bool((np.isnan(out) == nan).all() and (out.view(bits)[~nan] == expected.view(bits)[~nan]).all())


# "Integer Arithmetic Instructions"


def test_integers_wrap() -> None:
    assert (run("add.s32 %out, %in0, %in1;", A32, B32) == A32 + B32).all()
    assert (run("sub.u32 %out, %in0, %in1;", A32, B32) == A32 - B32).all()
    assert (run("mul.lo.s32 %out, %in0, %in1;", A32, B32) == A32 * B32).all()
    assert (run("mad.lo.u32 %out, %in0, %in1, %in0;", A32, B32) == A32 * B32 + A32).all()
    assert (run("neg.s32 %out, %in0;", A32) == np.negative(A32)).all()


def test_high_and_wide_products() -> None:
    products = [a * b for a, b in zip(signed(A32), signed(B32), strict=True)]
    assert signed(run("mul.hi.s32 %out, %in0, %in1;", A32, B32)) == [p >> 32 for p in products]
    assert run("mul.wide.s32 %out, %in0, %in1;", A32, B32, result=np.int64).tolist() == products
    assert run("mul.hi.u32 %out, %in0, %in1;", A32, B32).tolist() == [
        int(a) * int(b) >> 32 for a, b in zip(A32, B32, strict=True)
    ]
    wide = RANDOM.integers(0, 2**64, 64, np.uint64)
    expected = [int(a) * int(b) >> 64 for a, b in zip(wide, wide[::-1], strict=True)]
    assert run("mul.hi.u64 %out, %in0, %in1;", wide, wide[::-1], result=np.uint64).tolist() == expected


def test_division_rounds_towards_zero() -> None:
    """The remainder has the sign of the dividend."""
    a, b = np.array([7, -7, 7, -7, 6], np.int32), np.array([2, 2, -2, -2, 3], np.int32)
    assert run("div.s32 %out, %in0, %in1;", a, b, result=np.int32).tolist() == [3, -3, -3, 3, 2]
    assert run("rem.s32 %out, %in0, %in1;", a, b, result=np.int32).tolist() == [1, -1, 1, -1, 0]
    nonzero = np.where(B32 == 0, np.uint32(5), B32)
    assert (run("div.u32 %out, %in0, %in1;", A32, nonzero) == A32 // nonzero).all()


def test_minima_distances_saturation() -> None:
    sa, sb = np.array(signed(A32)), np.array(signed(B32))
    assert signed(run("max.s32 %out, %in0, %in1;", A32, B32)) == np.maximum(sa, sb).tolist()
    assert run("min.u32 %out, %in0, %in1;", A32, B32).tolist() == np.minimum(A32, B32).tolist()
    assert signed(run("add.sat.s32 %out, %in0, %in1;", A32, B32)) == np.clip(sa + sb, -(2**31), 2**31 - 1).tolist()
    assert run("sad.s32 %out, %in0, %in1, %in1;", A32, B32).tolist() == ((abs(sa - sb) + sb) % 2**32).tolist()
    assert run("abs.s32 %out, %in0;", A32).tolist() == (abs(sa) % 2**32).tolist()


def test_dot_products_of_bytes() -> None:
    """dp4a: four products of bytes, each operand signed or not by itself."""
    for first, second in (("u32", "s32"), ("s32", "s32"), ("u32", "u32"), ("s32", "u32")):
        a = U32.view("i1" if first == "s32" else "u1").reshape(-1, 4).astype(int)
        b = V32.view("i1" if second == "s32" else "u1").reshape(-1, 4).astype(int)
        expected = ((a * b).sum(1) + U32) % 2**32
        assert (run(f"dp4a.{first}.{second} %out, %in0, %in1, %in0;", U32, V32) == expected).all()


def test_bit_fields() -> None:
    def extract(value: int, start: int, length: int, is_signed: bool) -> int:
        sign = value >> min(start + length - 1, 31) & 1 if is_signed and length else 0
        return sum((value >> start + i & 1 if start + i < 32 else sign) << i for i in range(length)) | (
            (2**32 - 1 >> length << length) * sign
        )

    starts, lengths = RANDOM.integers(0, 33, 64, np.uint32), RANDOM.integers(0, 33, 64, np.uint32)
    for kind in ("u32", "s32"):
        out = run(f"bfe.{kind} %out, %in0, %in1, %in2;", U32, starts, lengths)
        fields = zip(U32.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        assert out.tolist() == [extract(*field, kind == "s32") for field in fields]
    out = run("bfi.b32 %out, %in0, %in1, %in2, %in3;", U32, V32, starts, lengths)
    for a, b, start, length, value in zip(*(x.tolist() for x in (U32, V32, starts, lengths, out)), strict=True):
        mask = ((1 << length) - 1) << start & 0xFFFFFFFF
        assert value == (b & ~mask) | (a << start & mask)


def test_counts_of_bits() -> None:
    values = np.concatenate([EDGES_32, U32])
    assert run("popc.b32 %out, %in0;", values).tolist() == [int(x).bit_count() for x in values]
    assert run("clz.b32 %out, %in0;", values).tolist() == [32 - int(x).bit_length() for x in values]
    assert run("brev.b32 %out, %in0;", values).tolist() == [int(f"{x:032b}"[::-1], 2) for x in values]
    assert signed(run("bfind.u32 %out, %in0;", values)) == [int(x).bit_length() - 1 for x in values]
    others = [x if x >= 0 else ~x for x in signed(values)]
    assert signed(run("bfind.s32 %out, %in0;", values)) == [x.bit_length() - 1 for x in others]


# "Logic and Shift Instructions"


@pytest.mark.parametrize("table", [0xEA, 0x80, 0xFE, 0x96, 0x1B, 0xCA])
def test_lop3(table: int) -> None:
    """The table is the function of 0xF0, 0xCC and 0xAA."""
    c = U32[::-1].copy()
    out = run(f"lop3.b32 %out, %in0, %in1, %in2, {table};", U32, V32, c)
    for i in range(32):
        row = (U32 >> np.uint32(i) & 1) * 4 + (V32 >> np.uint32(i) & 1) * 2 + (c >> np.uint32(i) & 1)
        assert ((out >> np.uint32(i) & 1) == (table >> row & 1)).all()


def test_shifts_beyond_the_width() -> None:
    amounts = np.array([0, 1, 31, 32, 33, 255], np.uint32)
    values = np.full(6, 0x80000001, np.uint32)
    assert run("shl.b32 %out, %in0, %in1;", values, amounts).tolist() == [0x80000001, 2, 0x80000000, 0, 0, 0]
    assert run("shr.u32 %out, %in0, %in1;", values, amounts).tolist() == [0x80000001, 0x40000000, 1, 0, 0, 0]
    assert signed(run("shr.s32 %out, %in0, %in1;", values, amounts))[2:] == [-1, -1, -1, -1]
    pairs = [(int(b) << 32 | int(a), s) for a, b, s in zip(U32[:6], V32[:6], amounts.tolist(), strict=True)]
    left = run("shf.l.wrap.b32 %out, %in0, %in1, %in2;", U32[:6], V32[:6], amounts)
    assert left.tolist() == [x << (s & 31) >> 32 & 0xFFFFFFFF for x, s in pairs]
    right = run("shf.r.clamp.b32 %out, %in0, %in1, %in2;", U32[:6], V32[:6], amounts)
    assert right.tolist() == [x >> min(s, 32) & 0xFFFFFFFF for x, s in pairs]


def test_permutation_of_bytes() -> None:
    """prmt, default mode: the highest bit of a selector replicates the sign."""
    selectors = RANDOM.integers(0, 2**16, 64, np.uint32)
    out = run("prmt.b32 %out, %in0, %in1, %in2;", U32, V32, selectors)
    for a, b, selector, value in zip(*(x.tolist() for x in (U32, V32, selectors, out)), strict=True):
        both = b << 32 | a
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = both >> 8 * (nibble & 7) & 255
            assert value >> 8 * i & 255 == ((255 if byte & 128 else 0) if nibble & 8 else byte)


# "Floating Point Instructions"


def test_float32_is_that_of_ieee() -> None:
    with np.errstate(all="ignore"):
        for name, expected in {"add": FA + FB, "sub": FA - FB, "mul": FA * FB, "div": FA / FB}.items():
            assert same_floats(run(f"{name}.rn.f32 %out, %in0, %in1;", FA, FB, result=np.float32), expected), name
        assert same_floats(run("sqrt.rn.f32 %out, %in0;", FA, result=np.float32), np.sqrt(FA))


def exact(x: float) -> Fraction:
    return Fraction(float(x))


def test_fma_rounds_once() -> None:
    """Nearest, and in both directions: the result is the neighbour of the exact value that the rounding asks for."""
    a, b = (RANDOM.standard_normal(300).astype(np.float32) for _ in range(2))
    # Sums near a tie of the result, and cancellation.
    c = np.concatenate([(-a * b)[:100], (a * b * np.float32(2.0**24))[100:200], (a * np.float32(2.0**-24))[200:]])
    values = [exact(x) * exact(y) + exact(z) for x, y, z in zip(a, b, c, strict=True)]
    out = {
        mode: run(f"fma.{mode}.f32 %out, %in0, %in1, %in2;", a, b, c, result=np.float32) for mode in ("rn", "rm", "rp")
    }
    for value, nearest, low, high in zip(values, out["rn"], out["rm"], out["rp"], strict=True):
        assert exact(low) <= value <= exact(high)
        assert low == high or np.nextafter(low, np.float32(np.inf)) == high
        assert abs(exact(nearest) - value) == min(abs(exact(low) - value), abs(exact(high) - value))
        if exact(high) - value == value - exact(low) and low != high:
            assert nearest.view(np.uint32) % 2 == 0


def test_fma_of_sixteen_bits() -> None:
    """f16x2 and bf16: rounded once as well, against fractions."""
    halves = RANDOM.standard_normal((3, 128)).astype(np.float16)
    a, b, c = (x.view(np.uint32) for x in halves)
    out = run("fma.rn.f16x2 %out, %in0, %in1, %in2;", a, b, c).view(np.float16)
    for x, y, z, value in zip(*halves, out, strict=True):
        error = abs(exact(value) - (exact(x) * exact(y) + exact(z)))
        assert error <= abs(exact(np.nextafter(value, np.float16(np.inf))) - exact(value)) / 2
    bits = [torch.randn(64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    inputs = [x.view(torch.int16).numpy() for x in bits]
    out = run("fma.rn.bf16 %out, %in0, %in1, %in2;", *inputs, result=np.int16)
    expected = (bits[0].double() * bits[1].double() + bits[2].double()).to(torch.float64)
    nearest = torch.from_numpy(out).view(torch.bfloat16).double()
    assert ((nearest - expected).abs() <= nearest.abs() * 2.0**-8).all()


def test_minima_of_floats() -> None:
    """NaN gives way to a number, but with .NaN; -0 is below +0."""
    a = np.array([np.nan, 1, np.nan, 0.0, -0.0, 2], np.float32)
    b = np.array([1, np.nan, np.nan, -0.0, 0.0, 3], np.float32)
    least = run("min.f32 %out, %in0, %in1;", a, b, result=np.float32)
    assert same_floats(least, np.array([1, 1, np.nan, -0.0, -0.0, 2], np.float32))
    assert least.view(np.uint32)[2] == 0x7FFFFFFF
    most = run("max.NaN.f32 %out, %in0, %in1;", a, b, result=np.float32)
    assert same_floats(most, np.array([np.nan, np.nan, np.nan, 0.0, 0.0, 3], np.float32))


def test_flushing_and_saturation() -> None:
    tiny, values = np.array([_TINY, -_TINY], np.float32), np.array([-1, 0.5, 2, np.nan], np.float32)
    out = run("add.ftz.f32 %out, %in0, 0f00000000;", tiny, result=np.float32)
    assert out.tolist() == [0, 0]
    assert run("add.f32 %out, %in0, 0f00000000;", tiny, result=np.float32).tolist() == tiny.tolist()
    assert run("mul.ftz.f32 %out, %in0, 0f3F800000;", tiny, result=np.float32).view(np.uint32).tolist() == [0, 1 << 31]
    assert run("add.sat.f32 %out, %in0, 0f00000000;", values, result=np.float32).tolist() == [0, 0.5, 1, 0]


def test_signs_of_floats() -> None:
    """neg and abs change the sign of a NaN as well."""
    bits = np.array([0x7FC00001, 0xFFC00001, 0, 1 << 31], np.uint32)
    assert run("neg.f32 %out, %in0;", bits).tolist() == (bits ^ np.uint32(1 << 31)).tolist()
    assert run("abs.f32 %out, %in0;", bits).tolist() == (bits & np.uint32(0x7FFFFFFF)).tolist()
    assert run("neg.bf16x2 %out, %in0;", bits).tolist() == (bits ^ np.uint32(0x80008000)).tolist()


def test_approximations_are_close() -> None:
    x = np.linspace(0.1, 20, 64, dtype=np.float32)
    functions = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": np.reciprocal,
        "rsqrt": lambda v: 1 / np.sqrt(v),
        "tanh": np.tanh,
    }
    for name, function in functions.items():
        out = run(f"{name}.approx.f32 %out, %in0;", x, result=np.float32)
        np.testing.assert_allclose(out, function(x.astype(np.float64)), rtol=2e-7, atol=1e-7)


# "Comparison and Selection Instructions"


def test_comparisons_with_nan() -> None:
    for name, expected in {
        "eq": FA == FB,
        "ne": (FA < FB) | (FA > FB),
        "ltu": ~(FA >= FB),
        "ge": FA >= FB,
        "neu": FA != FB,
        "num": ~(np.isnan(FA) | np.isnan(FB)),
        "nan": np.isnan(FA) | np.isnan(FB),
    }.items():
        out = run(f"setp.{name}.f32 %p1, %in0, %in1; selp.u32 %out, 7, 9, %p1;", FA, FB)
        assert (out == np.where(expected, 7, 9)).all(), name


def test_comparisons_are_combined() -> None:
    """p = (a < b) and c, q = not (a < b) and c"""
    body = """setp.ne.u32 %p1, %in2, 0; setp.lt.and.s32 %p2|%p3, %in0, %in1, !%p1;
              selp.u32 %out0, 1, 0, %p2; selp.u32 %out1, 1, 0, %p3;"""
    c = (np.arange(len(A32)) % 2).astype(np.uint32)
    less = A32.view(np.int32) < B32.view(np.int32)
    out = run(body, A32, B32, c, per_thread=2)
    assert (out[:, 0] == (less & (c == 0))).all()
    assert (out[:, 1] == (~less & (c == 0))).all()


# "Data Movement and Conversion Instructions: cvt"


def test_float_to_sixteen_bits() -> None:
    """To the nearest, ties to even; NaN is canonical. Held against torch."""
    values = np.concatenate([FLOATS, RANDOM.integers(0, 2**32, 200, np.uint32).view(np.float32)])
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        out = run(f"cvt.rn.{kind}.f32 %out, %in0;", values, result=np.uint16)
        expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
        nan = np.isnan(values)
        assert (out[~nan] == expected[~nan]).all()
        assert (out[nan] == 0x7FFF).all()
        packed = run(f"cvt.rn.{kind}x2.f32 %out, %in0, %in1;", values, values[::-1])
        assert (packed >> np.uint32(16) == out).all()
        assert (packed & np.uint32(0xFFFF) == out[::-1]).all()
        cut = run(f"cvt.rz.{kind}x2.f32 %out, %in0, %in0;", values) & np.uint32(0xFFFF)
        back = torch.from_numpy(cut.astype(np.uint16).view(np.int16)).view(dtype).float().numpy()
        finite = np.isfinite(values)
        assert (np.abs(back[finite]) <= np.abs(values[finite])).all()
        assert ((cut == out) | (cut + 1 == out))[finite].all()


def test_half_to_float_is_exact() -> None:
    bits = np.arange(0, 2**16, 97, dtype=np.uint16)
    assert same_floats(
        run("cvt.f32.f16 %out, %in0;", bits, result=np.float32), bits.view(np.float16).astype(np.float32)
    )


def test_float_to_integer() -> None:
    """Rounded as asked, clamped to the range, NaN to 0 (to 64 bits, the highest bit alone)."""
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2147483647.0, 3e9, -3e9, np.nan, np.inf, -np.inf, 300], np.float32)
    top, low = 2**31 - 1, -(2**31)
    signs = {"rni": [0, 2, 2, 0, -2], "rzi": [0, 1, 2, 0, -1], "rmi": [0, 1, 2, -1, -2], "rpi": [1, 2, 3, 0, -1]}
    for mode, first in signs.items():
        out = run(f"cvt.{mode}.s32.f32 %out, %in0;", values, result=np.int32)
        assert out.tolist() == [*first, top, top, low, 0, top, low, 300]
    assert run("cvt.rzi.u32.f32 %out, %in0;", values).tolist()[6:] == [3000000000, 0, 0, 2**32 - 1, 0, 300]
    assert run("cvt.rzi.s64.f32 %out, %in0;", values, result=np.int64).tolist()[8] == -(2**63)
    assert run("cvt.rzi.u8.f32 %h1, %in0; cvt.u32.u16 %out, %h1;", values).tolist()[-1] == 255


def test_integer_to_float_and_sizes() -> None:
    values = np.array([0, 1, -1, 2**24 + 1, 2**31 - 1, -(2**31)], np.int32)
    assert (run("cvt.rn.f32.s32 %out, %in0;", values, result=np.float32) == values.astype(np.float32)).all()
    assert run(
        "cvt.s8.s32 %h1, %in0; cvt.s32.s16 %out, %h1;", np.array([255, 128, 127], np.int32), result=np.int32
    ).tolist() == [-1, -128, 127]
    saturated = run(
        "cvt.sat.s8.s32 %h1, %in0; cvt.s32.s16 %out, %h1;", np.array([300, -300, 5], np.int32), result=np.int32
    )
    assert saturated.tolist() == [127, -128, 5]
    assert run("cvt.s64.s32 %out, %in0;", values, result=np.int64).tolist() == values.tolist()
    assert (
        run("cvt.u64.u32 %out, %in0;", values, result=np.uint64).tolist() == (values.astype(np.int64) % 2**32).tolist()
    )


def test_tf32() -> None:
    """.rna: ties away from zero, at 10 bits of mantissa."""
    values = np.array([1 + 2.0**-11, 1 + 2.0**-12, -1 - 2.0**-11, np.inf], np.float32)
    out = run("cvt.rna.tf32.f32 %out, %in0;", values, result=np.float32)
    assert out.tolist() == [1 + 2.0**-10, 1, -1 - 2.0**-10, np.inf]


def test_float_to_integral_float() -> None:
    values = np.array([0.5, 1.5, -0.5, 2.7], np.float32)
    assert run("cvt.rni.f32.f32 %out, %in0;", values, result=np.float32).tolist() == [0, 2, -0.0, 3]
    assert run("cvt.rmi.f32.f32 %out, %in0;", values, result=np.float32).tolist() == [0, 1, -1, 2]


# "Data Movement and Conversion Instructions: mov"


def test_registers_are_packed() -> None:
    """{a, b}: a is the lower part."""
    out = run("mov.b32 {%h1, %h2}, %in0; mov.b32 %out, {%h2, %h1};", U32)
    assert (out == (U32 >> np.uint32(16) | U32 << np.uint32(16))).all()
    out = run("mov.b64 %out, {%in0, %in1};", U32, V32, result=np.uint64)
    assert (out == (V32.astype(np.uint64) << np.uint64(32) | U32)).all()
