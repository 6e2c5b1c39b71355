"""GPTQ and dense matmul: layout round trips, bitwise invariance, special values, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teco_kernels.ops import DenseWeight, GPTQWeight, dense_matmul, gptq_matmul
from teco_kernels.ops._library import cpu_isa_choices
from teco_kernels.ops._reference import relative_error
from teco_kernels.ops.gptq import gptq_matmul_reference
from teco_kernels.ops.packing import BITS, codes_per_period, pack_rows, unpack_rows, unpack_zeros
from teco_kernels.testing.cases.matmul import INT8_TOLERANCE, random_checkpoint, random_minima

MODES = ("exact", "int8")


def checkpoint(
    in_features: int = 192, out_features: int = 72, group_size: int = 64, bits: int = 4, **options: Any
) -> Any:
    return random_checkpoint(in_features, out_features, group_size, bits, torch.Generator().manual_seed(1), **options)


def plain_dequantize(tensors: dict[str, Any], zero_offset: int) -> torch.Tensor:
    """``scale * (code - zero)`` straight from the checkpoint's tensors, without the packed layout."""
    bits, groups = tensors["bits"], tensors["g_idx"].long()
    codes = unpack_rows(tensors["qweight"], bits).float()
    zeros = unpack_rows(tensors["qzeros"].t().contiguous(), bits).t().float() + zero_offset
    return tensors["scales"][groups].float() * (codes - zeros[groups])


@pytest.mark.parametrize("bits", BITS)
def test_every_code_in_its_place(bits: int) -> None:
    """Against the definition of the checkpoint, one little-endian string of bits; by the kernel, and undone."""

    def codes(words: torch.Tensor) -> list[int]:
        string = int.from_bytes(words.contiguous().numpy().tobytes(), "little")
        return [string >> bits * place & 2**bits - 1 for place in range(len(words) * 32 // bits)]

    tensors = checkpoint(64, 32, 32, bits)
    expected = torch.tensor([codes(column) for column in tensors["qweight"].t()]).t()
    zeros = torch.tensor([codes(row) for row in tensors["qzeros"]]) + 1
    values = (expected.unflatten(0, (2, 32)) - zeros[:, None]) * tensors["scales"][:, None].float()
    weight = GPTQWeight.from_checkpoint(**tensors)
    assert torch.equal(weight.dequantize(), values.flatten(0, 1))
    assert torch.equal(gptq_matmul(torch.eye(64), weight), values.flatten(0, 1))


@settings(max_examples=60, deadline=None)
@given(
    in_blocks=st.integers(1, 12),
    out_blocks=st.integers(1, 10),
    group_size=st.sampled_from([8, 24, 32, 40, 64, 128, 1000]),
    bits=st.sampled_from(BITS),
    act_order=st.booleans(),
    rows=st.integers(0, 12),
)
def test_any_shape(in_blocks: int, out_blocks: int, group_size: int, bits: int, act_order: bool, rows: int) -> None:
    in_features, out_features = (blocks * codes_per_period(bits) for blocks in (in_blocks, out_blocks))
    tensors = checkpoint(in_features, out_features, group_size, bits, act_order=act_order)
    weight = GPTQWeight.from_checkpoint(**tensors)
    assert torch.equal(weight.dequantize(), plain_dequantize(tensors, 1))
    x = torch.randn(rows, in_features)
    reference = gptq_matmul_reference(x, weight)
    assert relative_error(gptq_matmul(x, weight), reference) < 1e-5
    assert relative_error(gptq_matmul(x, weight, activation="int8"), reference) < 2 * INT8_TOLERANCE


@pytest.mark.parametrize("zero_point_format", ["v1", "v2"])
def test_zero_point_formats(zero_point_format: Any) -> None:
    tensors = checkpoint()
    weight = GPTQWeight.from_checkpoint(**tensors, zero_point_format=zero_point_format)
    assert torch.equal(weight.dequantize(), plain_dequantize(tensors, zero_point_format == "v1"))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [24, 32, 192])
def test_minima(bits: int, group_size: int) -> None:
    """``scale * code + minimum``, rounded once; the kernel unpacks the very same bits."""
    tensors = random_minima(192, 72, group_size, bits, torch.Generator().manual_seed(1))
    groups = tensors["g_idx"].long()
    expected = tensors["scales"][groups].float() * tensors["codes"].float() + tensors["minimum"][groups].float()
    weight = GPTQWeight.from_codes(**tensors, bias=torch.randn(72))
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(gptq_matmul(torch.eye(192), replace(weight, bias=None)), expected)
    x = torch.randn(21, 192)
    for activation, tolerance in (("exact", 1e-5), ("int8", INT8_TOLERANCE)):
        whole = gptq_matmul(x, weight, activation=activation)  # type: ignore[arg-type]
        assert relative_error(whole, gptq_matmul_reference(x, weight)) < tolerance
        for rows in (1, 2, 7, 8):
            assert torch.equal(gptq_matmul(x[:rows], weight, activation=activation), whole[:rows])  # type: ignore[arg-type]


def test_codes_make_the_weight_of_the_checkpoint() -> None:
    tensors = checkpoint(act_order=True)
    codes, zeros = unpack_rows(tensors["qweight"], 4), unpack_zeros(tensors["qzeros"], 4)
    weight = GPTQWeight.from_codes(codes, tensors["scales"], zeros=zeros, g_idx=tensors["g_idx"], bits=4)
    assert torch.equal(weight.packed, GPTQWeight.from_checkpoint(**tensors).packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("activation", MODES)
def test_rows_do_not_depend_on_the_batch(bits: int, activation: Any) -> None:
    weight = GPTQWeight.from_checkpoint(**checkpoint(320, 224, bits=bits, act_order=bits < 4), bias=torch.randn(224))
    x = torch.randn(40, 320)
    whole = gptq_matmul(x, weight, activation=activation)
    for rows in range(1, 40):
        assert torch.equal(gptq_matmul(x[:rows], weight, activation=activation), whole[:rows]), rows
        assert torch.equal(gptq_matmul(x[rows:], weight, activation=activation), whole[rows:]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_rows_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    weight = DenseWeight.from_tensor(torch.randn(200, 700).to(dtype))
    x = torch.randn(40, 700).to(dtype)
    whole = dense_matmul(x, weight)
    for rows in (1, 2, 3, 7, 39):
        assert torch.equal(dense_matmul(x[:rows], weight), whole[:rows]), rows
        assert torch.equal(dense_matmul(x[rows:], weight), whole[rows:]), rows


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("activation", MODES)
def test_thread_count_does_not_change_bits(activation: Any, bits: int) -> None:
    weight = GPTQWeight.from_checkpoint(**checkpoint(512, 1056, bits=bits))
    before = torch.get_num_threads()
    try:
        for rows in (1, 20):
            x, results = torch.randn(rows, 512), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(gptq_matmul(x, weight, activation=activation))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_avx2_and_avx512_give_the_same_bits() -> None:
    isas = [isa for isa in cpu_isa_choices() if isa != "baseline"]  # which has no fused multiply-add
    program = """
import hashlib, torch
from teco_kernels.ops import GPTQWeight, gptq_matmul
from teco_kernels.testing.cases.matmul import random_checkpoint
digest = hashlib.sha256()
for bits in (2, 3, 4, 8):
    g = torch.Generator().manual_seed(bits)
    weight = GPTQWeight.from_checkpoint(**random_checkpoint(320, 224, 64, bits, g))
    for rows in (1, 2, 3, 4, 5, 8, 13, 40):
        x = torch.randn(rows, 320, generator=g)
        for section_size in (None, 128):
            digest.update(gptq_matmul(x, weight, activation="int8", section_size=section_size).numpy().tobytes())
print(digest.hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"TECO_CPU_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for isa in isas
    }
    assert len(digests) <= 1


def sum_of_sections(x: torch.Tensor, tensors: dict[str, Any], section_size: int, bias: torch.Tensor) -> torch.Tensor:
    """fp64, from weights of one section each, in numbers that can be added in any order."""
    total = torch.zeros(len(x), len(bias), dtype=torch.float64)
    groups = tensors["scales"].shape[0]
    for section in torch.arange(x.shape[1]).split(section_size):
        rows = section[:: x.shape[1] // groups] // (x.shape[1] // groups)
        part = {"scales": tensors["scales"][rows], "zeros": tensors["zeros"][rows], "codes": tensors["codes"][section]}
        weight = GPTQWeight.from_codes(**part, bits=tensors["bits"])
        total += torch.round(gptq_matmul(x[:, section], weight, activation="int8").double() * 2.0**32) / 2.0**32
    return total + torch.round(bias.double() * 2.0**32) / 2.0**32


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    groups=st.integers(1, 9),
    groups_per_section=st.integers(1, 4),
    out_features=st.sampled_from([1, 16, 40, 200]),
    rows=st.integers(1, 19),
    cut=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_sections_are_added_exactly(
    bits: int, groups: int, groups_per_section: int, out_features: int, rows: int, cut: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    group_size = 32 * (1 + seed % 2)
    section_size = groups_per_section * group_size
    tensors: dict[str, Any] = {
        "codes": torch.randint(0, 2**bits, (groups * group_size, out_features), generator=g, dtype=torch.uint8),
        "scales": torch.rand(groups, out_features, generator=g).half(),
        "zeros": torch.randint(0, 2**bits + 1, (groups, out_features), generator=g),
        "bits": bits,
    }
    bias = torch.randn(out_features, generator=g)
    x = torch.randn(rows, groups * group_size, generator=g)
    expected = sum_of_sections(x, tensors, section_size, bias)

    options: dict[str, Any] = {"activation": "int8", "section_size": section_size}
    weight = GPTQWeight.from_codes(**tensors, bias=bias)
    exact = torch.empty(rows, out_features, dtype=torch.float64)
    assert torch.equal(gptq_matmul(x, weight, **options, out=exact), expected)
    assert torch.equal(gptq_matmul(x, weight, **options), expected.float())
    half = gptq_matmul(x.half(), weight, **options)
    assert torch.equal(half, sum_of_sections(x.half().float(), tensors, section_size, bias).float().half())

    # Two that share the inputs, cut between sections, give the same together.
    border = min(cut * section_size, x.shape[1])
    parts = []
    for inputs in (slice(0, border), slice(border, x.shape[1])):
        if inputs.start < inputs.stop:
            rows_of = slice(inputs.start // group_size, inputs.stop // group_size)
            part = {name: tensors[name][rows_of] for name in ("scales", "zeros")}
            first = bias if not parts else None
            packed = GPTQWeight.from_codes(codes=tensors["codes"][inputs], **part, bits=bits, bias=first)
            parts.append(gptq_matmul(x[:, inputs], packed, **options, out=torch.empty_like(exact)))
    assert torch.equal(sum(parts), exact)


def test_large_sums_of_sections_stay_close() -> None:
    """Beyond 2^21 sums are no longer exact, but as good as any."""
    weight = GPTQWeight.from_checkpoint(**checkpoint(512, 32))
    x = torch.randn(3, 512) * 1e6
    plain = gptq_matmul(x, weight, activation="int8")
    assert relative_error(gptq_matmul(x, weight, activation="int8", section_size=128), plain) < 1e-6
    x[1, 7] = torch.inf
    assert gptq_matmul(x, weight, activation="int8", section_size=64)[1].isnan().all()


@pytest.mark.parametrize("bits", BITS)
def test_split_groups_are_the_same_weight(bits: int) -> None:
    weight = GPTQWeight.from_checkpoint(**checkpoint(512, 96, 128, bits))
    split = weight.split_groups(64)
    assert split.group_size == 64
    assert torch.equal(split.dequantize(), weight.dequantize())
    x = torch.randn(2, 512)
    assert torch.equal(gptq_matmul(x, split), gptq_matmul(x, weight))
    assert weight.split_groups(128) is weight
    with pytest.raises(ValueError, match="size: groups of 128 inputs cannot be split into groups of 48"):
        weight.split_groups(48)


def test_wrong_sections_are_refused() -> None:
    weight = GPTQWeight.from_checkpoint(**checkpoint(512, 72, 128))
    x, exact = torch.randn(2, 512), torch.empty(2, 72, dtype=torch.float64)
    for options, text in (
        ({"activation": "int8", "section_size": 64}, "section_size: expected a multiple of the 128 inputs"),
        ({"activation": "int8", "section_size": -1}, "section_size: expected a positive number"),
        ({"activation": "exact", "section_size": 128}, "section_size: expected int8 activations"),
    ):
        with pytest.raises(ValueError, match=text):
            gptq_matmul(x, weight, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="out: expected the dtype of x"):
        gptq_matmul(x, weight, activation="int8", out=exact)
    shuffled = GPTQWeight.from_checkpoint(**checkpoint(512, 72, 128, act_order=True))
    with pytest.raises(ValueError, match="section_size: expected a weight whose inputs are in their order"):
        gptq_matmul(x, shuffled, activation="int8", section_size=128)


@pytest.mark.parametrize("bits", BITS)
def test_exact_mode_is_the_dense_product_of_the_dequantised_weight(bits: int) -> None:
    weight = GPTQWeight.from_checkpoint(**checkpoint(out_features=96, bits=bits))
    dense = DenseWeight.from_tensor(weight.dequantize().t())
    x = torch.randn(9, 192)
    assert torch.equal(gptq_matmul(x, weight), dense_matmul(x, dense))


def test_act_order_is_a_permutation_of_the_inputs() -> None:
    plain = checkpoint()
    permutation = torch.randperm(192)
    words = pack_rows(unpack_rows(plain["qweight"], 4)[permutation], 4)
    shuffled = GPTQWeight.from_checkpoint(**(plain | {"qweight": words, "g_idx": plain["g_idx"][permutation]}))
    weight, x = GPTQWeight.from_checkpoint(**plain), torch.randn(5, 192)
    assert torch.equal(shuffled.dequantize(), weight.dequantize()[permutation])
    assert relative_error(gptq_matmul(x[:, permutation], shuffled), gptq_matmul(x, weight)) < 1e-6


def test_concatenated_weights_give_the_same_bits() -> None:
    parts = [GPTQWeight.from_checkpoint(**checkpoint(out_features=n)) for n in (32, 48, 40)]
    joined = GPTQWeight.concatenate(parts)
    x = torch.randn(3, 192)
    for activation in ("exact", "int8"):
        separate = torch.cat([gptq_matmul(x, part, activation=activation) for part in parts], dim=1)  # type: ignore[arg-type]
        assert torch.equal(gptq_matmul(x, joined, activation=activation), separate)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights\[1\]: expected the in_features"):
        GPTQWeight.concatenate([parts[0], GPTQWeight.from_checkpoint(**checkpoint(group_size=32))])
    with pytest.raises(ValueError, match=r"weights\[0\]: expected out_features to be a multiple of 16, got 40"):
        GPTQWeight.concatenate([parts[2], parts[0]])


@pytest.mark.parametrize("activation", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_special_values_stay_in_their_row(activation: Any, bad: float) -> None:
    weight = GPTQWeight.from_checkpoint(**checkpoint())
    x = torch.randn(12, 192)
    clean = gptq_matmul(x, weight, activation=activation)
    x[4, 100] = bad
    out = gptq_matmul(x, weight, activation=activation)
    assert not out[4].isfinite().any()
    others = [row for row in range(12) if row != 4]
    assert torch.equal(out[others], clean[others])


def test_zero_and_extreme_activations() -> None:
    weight = GPTQWeight.from_checkpoint(**checkpoint())
    x = torch.stack((torch.zeros(192), torch.full((192,), 1e-38), torch.full((192,), 1e30)))
    out = gptq_matmul(x, weight, activation="int8")
    assert torch.equal(out[0], torch.zeros(72))
    assert out.isfinite().all()
    assert relative_error(out[2], gptq_matmul(x[2:], weight)[0]) < INT8_TOLERANCE


def test_leading_dimensions_strides_and_out() -> None:
    weight = GPTQWeight.from_checkpoint(**checkpoint())
    wide = torch.randn(2, 3, 400)
    x, out = wide[..., :192], torch.full((2, 3, 100), 7.0)
    returned = gptq_matmul(x, weight, activation="int8", out=out[..., :72])
    assert returned.data_ptr() == out.data_ptr()
    assert torch.equal(out[..., :72], gptq_matmul(x.contiguous(), weight, activation="int8"))
    assert (out[..., 72:] == 7).all()


def test_contradictory_checkpoints_are_refused() -> None:
    good = checkpoint()

    def refuse(match: str, exception: type[Exception] = ValueError, **changes: Any) -> None:
        with pytest.raises(exception, match=match):
            GPTQWeight.from_checkpoint(**(good | changes))

    refuse(r"bits: expected one of \(2, 3, 4, 8\), got 5", bits=5)
    refuse(r"qzeros: expected shape \[3, 6.75\] \(72 zero points of 3 bits\), got \[3, 9\]", bits=3)
    refuse(r"qweight: expected a multiple of 3 rows with 3 bits, got \[23, 72\]", bits=3, qweight=good["qweight"][:23])
    refuse(r"qzeros: expected shape \[3, 18\] \(72 zero points of 8 bits\), got \[3, 9\]", bits=8)
    refuse(r"scales: expected shape \[num_groups, 72\], got \[3, 71\]", scales=good["scales"][:, :71])
    refuse(r"qzeros: expected shape \[3, 9\]", qzeros=good["qzeros"][:2])
    refuse(r"qweight: expected dtype int32, got int64", TypeError, qweight=good["qweight"].long())
    refuse(r"g_idx: expected groups 0 to 2, got 0 to 7", g_idx=torch.arange(192) % 8)
    refuse(r"g_idx: expected shape \[192\], got \[5\]", g_idx=torch.zeros(5, dtype=torch.int32))
    refuse(
        r"scales: 5 groups do not divide 192",
        g_idx=None,
        scales=good["scales"][[0] * 5],
        qzeros=good["qzeros"][[0] * 5],
    )
    refuse(r"qweight: expected at least one input and one output, got shape \[0, 72\]", qweight=good["qweight"][:0])
    refuse(r"scales: expected finite values", scales=good["scales"] * float("nan"))
    refuse(r"bias: expected shape \[72\], got \[3\]", bias=torch.zeros(3))


def test_contradictory_codes_are_refused() -> None:
    good = random_minima(192, 72, 64, 4, torch.Generator())

    def refuse(match: str, exception: type[Exception] = ValueError, **changes: Any) -> None:
        with pytest.raises(exception, match=match):
            GPTQWeight.from_codes(**(good | changes))

    zeros = torch.zeros(3, 72, dtype=torch.int64)
    refuse(r"bits: expected one of \(2, 3, 4, 8\), got 5", bits=5)
    refuse("zeros, minimum: expected one of the two", minimum=None)
    refuse("zeros, minimum: expected one of the two", zeros=zeros)
    refuse("codes: expected dtype uint8, got int64", TypeError, codes=good["codes"].long())
    refuse(r"codes: expected at least one input and one output, got shape \[192, 0\]", codes=good["codes"][:, :0])
    refuse(
        r"codes: expected values from 0 to 15, got 16", codes=good["codes"].fill_(1).index_fill_(0, zeros[0, :1], 16)
    )
    good["codes"].zero_()
    refuse(r"scales: expected shape \[num_groups, 72\], got \[3, 71\]", scales=good["scales"][:, :71])
    refuse(r"minimum: expected the shape of scales, \[3, 72\], got \[2, 72\]", minimum=good["minimum"][:2])
    refuse(r"zeros: expected the shape of scales, \[3, 72\], got \[2, 72\]", minimum=None, zeros=zeros[:2])
    refuse("scales: expected a floating dtype, got int64", TypeError, scales=zeros)
    refuse("zeros: expected an integer dtype, got float16", TypeError, minimum=None, zeros=good["minimum"])
    refuse("zeros: expected values from 0 to 16, got 17 to 17", minimum=None, zeros=zeros + 17)
    refuse("minimum: expected finite values", minimum=good["minimum"] * float("inf"))
    refuse("scales: expected finite values", scales=good["scales"] * float("nan"))
    refuse("g_idx: expected groups 0 to 2", g_idx=good["g_idx"] + 1)


def test_bad_calls_are_refused() -> None:
    weight = GPTQWeight.from_checkpoint(**checkpoint())
    with pytest.raises(ValueError, match="gptq_matmul: x: expected 192 input features in the last dimension, got 64"):
        gptq_matmul(torch.randn(2, 64), weight)
    with pytest.raises(TypeError, match="x: expected dtype float32, float16, bfloat16, got int64"):
        gptq_matmul(torch.ones(2, 192, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match="activation: expected 'exact' or 'int8', got 'fp4'"):
        gptq_matmul(torch.randn(2, 192), weight, activation="fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out: expected 2 x 72 elements, got 2 x 71"):
        gptq_matmul(torch.randn(2, 192), weight, out=torch.empty(2, 71))
    with pytest.raises(ValueError, match=r"bias: expected shape \[4\], got \[5\]"):
        DenseWeight.from_tensor(torch.randn(4, 8), torch.zeros(5))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["zeros", "minimum", "act-order"])
def test_selected_outputs_keep_their_bits(bits: int, kind: str) -> None:
    torch.manual_seed(bits)
    in_features, out_features, groups = 96, 70, 3
    codes = torch.randint(2**bits, (in_features, out_features), dtype=torch.uint8)
    offsets = {"minimum": torch.randn(groups, out_features)} if kind == "minimum" else {}
    zeros = {} if offsets else {"zeros": torch.randint(2**bits, (groups, out_features))}
    g_idx = torch.randperm(in_features).int() % groups if kind == "act-order" else None
    weight = GPTQWeight.from_codes(
        codes,
        torch.rand(groups, out_features),
        bits=bits,
        **offsets,
        **zeros,
        g_idx=g_idx,
        bias=torch.randn(out_features),
    )
    outputs = torch.tensor([69, 0, 3, 3, *range(20, 47)])
    x = torch.randn(5, in_features)
    for activation in ("exact", "int8"):
        expected = gptq_matmul(x, weight, activation=activation)[:, outputs]
        assert torch.equal(gptq_matmul(x, weight.select(outputs), activation=activation), expected)
    dense = DenseWeight.from_tensor(torch.randn(out_features, in_features), torch.randn(out_features))
    assert torch.equal(dense_matmul(x, dense.select(outputs)), dense_matmul(x, dense)[:, outputs])
