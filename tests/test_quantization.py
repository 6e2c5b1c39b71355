"""The quantizer: packing, the algorithm's properties, and whole models through to the decoder's loader."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers

from teco_kernels import LLM
from teco_kernels.assets import calibration_text
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.tokenizer import Tokenizer
from teco_kernels.decoder.weights import WeightLoader
from teco_kernels.ops import GPTQWeight
from teco_kernels.ops._reference import relative_error
from teco_kernels.ops.packing import BITS, pack_rows, pack_zeros, unpack_rows, unpack_zeros
from teco_kernels.ops.rope import cos_sin_cache
from teco_kernels.quantization import (
    HessianFactor,
    LayerReport,
    QuantizationSettings,
    gptq_quantize,
    model,
    quantize_model,
    round_to_nearest,
)
from teco_kernels.quantization.calibration import Drift, Hessian, token_windows
from teco_kernels.quantization.gptq import ActOrder
from teco_kernels.quantization.grid import fit_grid
from teco_kernels.quantization.perplexity import perplexity
from teco_kernels.quantization.refine import refine
from teco_kernels.quantization.report import REPORT_NAME, by_layer, draw
from teco_kernels.quantization.torch_layer import STAGES, Activations, TorchLayer
from teco_kernels.quantization.unfinished import Part, fingerprint, unfinished

ORDERS: tuple[ActOrder, ...] = (False, True, "static_groups", "group_aware")


def random_problem(
    out_features: int = 64, in_features: int = 96, tokens: int = 400, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs with a few strong channels, as a language model has them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    x = torch.randn(tokens, in_features, generator=generator) @ mixing
    x[:, :3] *= 10
    hessian = Hessian(in_features)
    hessian.add(x)
    return weight, hessian.matrix()


def squared_error(weight: torch.Tensor, quantised: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = quantised.double() - weight.double()
    return ((difference @ hessian) * difference).sum().item()


# Packing


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), words=st.integers(0, 4), columns=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_packing_round_trip(bits: int, words: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (words * 32, columns), generator=generator).to(torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (words * bits, columns)
    assert torch.equal(unpack_rows(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_one_little_endian_string_of_bits(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (32, 1), generator=torch.Generator().manual_seed(1))
    string = sum(int(code) << place * bits for place, code in enumerate(codes))
    packed = pack_rows(codes, bits).flatten().numpy().tobytes()
    assert int.from_bytes(packed, "little") == string


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_point_format", ["v1", "v2"])
def test_zero_points_round_trip(bits: int, zero_point_format: Any) -> None:
    offset = zero_point_format == "v1"
    zeros = torch.arange(64).view(2, 32) % 2**bits + offset
    packed = pack_zeros(zeros, bits, zero_point_format)
    assert packed.shape == (2, bits)
    assert torch.equal(unpack_zeros(packed, bits, zero_point_format), zeros)


def test_v1_stores_zero_points_minus_one() -> None:
    assert pack_zeros(torch.full((1, 8), 8), 4).item() == 0x77777777
    assert pack_zeros(torch.full((1, 8), 8), 4, "v2").item() & 0xFFFFFFFF == 0x88888888


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_rows(torch.full((8, 1), 16), 4), r"codes: expected values from 0 to 15, got 16 to 16"),
        (lambda: pack_rows(torch.full((8, 1), -1), 4), r"codes: expected values from 0 to 15, got -1"),
        (lambda: pack_rows(torch.zeros(7, 1), 4), r"codes: expected shape \[n, m\] with n \* 4"),
        (lambda: pack_rows(torch.zeros(32, 1), 5), r"bits: expected one of \(2, 3, 4, 8\), got 5"),
        (lambda: unpack_rows(torch.zeros(2, 1, dtype=torch.int32), 3), r"words: expected int32 .* multiple of 3"),
        (lambda: pack_zeros(torch.zeros(1, 8), 4), r"zeros: expected values from 1 to 16, which v1 can hold"),
        (lambda: pack_zeros(torch.full((1, 8), 16), 4, "v2"), r"zeros: expected values from 0 to 15"),
        (lambda: pack_zeros(torch.ones(1, 8), 4, "v3"), r"zero_point_format"),  # type: ignore[arg-type]
    ],
)
def test_packing_refuses(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Grids


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS), symmetric=st.booleans(), seed=st.integers(0, 2**31), shift=st.sampled_from([-9, 0, 9])
)
def test_grid_covers_its_weights(bits: int, symmetric: bool, seed: int, shift: int) -> None:
    weight = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    grid = fit_grid(weight, bits, symmetric=symmetric)
    assert torch.equal(grid.scale, grid.scale.half().double())
    assert (grid.zero >= 1).all()
    assert (grid.zero <= 2**bits - 1).all()
    # Half a step, or a whole one at the ends: of a symmetric grid the top lacks half a step, of another the zero point
    # was rounded.
    assert ((grid.values(grid.codes(weight)) - weight).abs() <= 1.01 * grid.scale).all()


def test_clip_search_lowers_the_error() -> None:
    weight = torch.randn(64, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for clip_search in (False, True):
        grid = fit_grid(weight, 3, symmetric=True, clip_search=clip_search)
        errors.append((grid.values(grid.codes(weight)) - weight).square().sum(0))
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_of_zero_and_near_it(symmetric: bool) -> None:
    weight = torch.zeros(8, 32)
    weight[0] = 1e-9
    weight[1] = -1e-9
    assert torch.equal(round_to_nearest(weight, group_size=32, symmetric=symmetric).dequantize(), torch.zeros(8, 32))


# The algorithm


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([8, 32, 96, -1]),
    symmetric=st.booleans(),
    act_order=st.sampled_from(ORDERS),
    clip_search=st.booleans(),
    tokens=st.sampled_from([3, 60, 400]),
)
def test_error_is_never_above_rounding(
    seed: int, bits: int, group_size: int, symmetric: bool, act_order: ActOrder, clip_search: bool, tokens: int
) -> None:
    weight, hessian = random_problem(32, 96, tokens, seed)
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    quantised = gptq_quantize(weight, hessian, act_order=act_order, clip_search=clip_search, **options)
    error, norm = squared_error(weight, quantised.dequantize(), hessian), squared_error(weight * 0, weight, hessian)
    assert quantised.error <= quantised.rounding_error
    assert math.isclose(quantised.error, (error / norm) ** 0.5, rel_tol=1e-4, abs_tol=1e-6)
    if act_order is not True and not clip_search:  # the grids are then those of plain rounding
        rounded = round_to_nearest(weight, **options)
        rounding_error = squared_error(weight, rounded.dequantize(), hessian)
        assert error <= rounding_error * (1 + 1e-4)
        assert math.isclose(quantised.rounding_error, (rounding_error / norm) ** 0.5, rel_tol=1e-4, abs_tol=1e-6)


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_error_is_well_below_rounding(bits: int, symmetric: bool, act_order: ActOrder) -> None:
    weight, hessian = random_problem()
    quantised = gptq_quantize(weight, hessian, bits=bits, group_size=32, symmetric=symmetric, act_order=act_order)
    assert quantised.error < 0.9 * quantised.rounding_error


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    block_size=st.sampled_from([1, 5, 16, 33, 96, 1000]),
    group_size=st.sampled_from([16, 24, 96]),
    bits=st.sampled_from(BITS),
    act_order=st.sampled_from(ORDERS),
    refine_sweeps=st.sampled_from([0, 2]),
)
def test_block_size_does_not_matter(
    seed: int, block_size: int, group_size: int, bits: int, act_order: ActOrder, refine_sweeps: int
) -> None:
    weight, hessian = random_problem(seed=seed)
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "act_order": act_order, "symmetric": False}
    options["refine_sweeps"] = refine_sweeps
    one, other = (gptq_quantize(weight, hessian, block_size=size, **options) for size in (64, block_size))
    # Sums are taken in another order, but in float64: no weight is so close to the middle between two codes.
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_identity_hessian_is_rounding(bits: int, symmetric: bool, clip_search: bool, act_order: ActOrder) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"bits": bits, "group_size": 32, "symmetric": symmetric, "clip_search": clip_search}
    quantised = gptq_quantize(weight, torch.eye(96), act_order=act_order, **options)
    rounded = round_to_nearest(weight, **options)
    for name, tensor in rounded.tensors().items():
        assert torch.equal(quantised.tensors()[name], tensor), name


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([8, 32, 96]),
    tokens=st.sampled_from([3, 60, 400]),
)
def test_no_step_of_refining_raises_an_error(seed: int, bits: int, group_size: int, tokens: int) -> None:
    weight, hessian = random_problem(32, 96, tokens, seed)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(96)
    target = weight.t().double()
    groups = target.unflatten(0, (-1, group_size))
    grids = [fit_grid(group, bits, symmetric=False) for group in groups]
    scales, zeros = (torch.stack([getattr(grid, name) for grid in grids]) for name in ("scale", "zero"))
    codes = torch.cat([grid.codes(group) for grid, group in zip(grids, groups, strict=True)]).to(torch.uint8)

    def errors() -> torch.Tensor:
        values = (codes.double().unflatten(0, (-1, group_size)) - zeros.unsqueeze(1)) * scales.unsqueeze(1)
        difference = values.flatten(0, 1) - target
        return (hessian @ difference * difference).sum(0)

    first = last = errors()
    for _ in range(3):
        refine(codes, scales, zeros, target, hessian, bits, 1)
        now = errors()
        assert (now <= last * (1 + 1e-9)).all()
        last = now
        assert torch.equal(scales, scales.half().double())
        assert codes.int().max() < 2**bits
    assert last.sum() < 0.9 * first.sum()


def test_refined_scales_are_those_of_least_squares() -> None:
    """Codes that stand for the target exactly, on scales that are all wrong: one sweep finds the right ones."""
    generator = torch.Generator().manual_seed(2)
    _, hessian = random_problem()
    codes = torch.randint(0, 16, (96, 8), generator=generator).to(torch.uint8)
    zeros = torch.randint(1, 16, (3, 8), generator=generator).double()
    zeros[1, 0] = 5
    codes[32:64, 0] = 5  # a group of zeros has any scale
    right = torch.rand(3, 8, generator=generator).half().double() + 0.5
    target = ((codes.double().unflatten(0, (3, 32)) - zeros.unsqueeze(1)) * right.unsqueeze(1)).flatten(0, 1)
    scales, found = torch.full_like(right, 0.1), codes.clone()
    refine(found, scales, zeros, target, hessian, 4, 1)
    assert torch.equal(found, codes)
    scales[1, 0] = right[1, 0]
    assert torch.allclose(scales, right, rtol=1e-3)


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_refining_pays(bits: int, symmetric: bool, act_order: ActOrder) -> None:
    weight, hessian = random_problem()
    options: dict[str, Any] = {"bits": bits, "group_size": 32, "symmetric": symmetric, "act_order": act_order}
    plain, refined = (gptq_quantize(weight, hessian, refine_sweeps=sweeps, **options) for sweeps in (0, 2))
    assert refined.error < 0.95 * plain.error
    assert math.isclose(refined.rounding_error, plain.rounding_error)
    assert torch.equal(refined.qzeros, plain.qzeros)


def plain_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int, act_order: ActOrder
) -> torch.Tensor:
    """The paper's algorithm as it is written down, column by column, with H^-1 updated by Gaussian elimination."""
    weight, inverse = (
        weight.double().clone(),
        torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))),
    )
    energy = hessian.diagonal().tolist()
    groups = [list(range(start, start + group_size)) for start in range(0, len(energy), group_size)]
    columns = range(len(energy))
    if act_order == "group_aware":
        groups.sort(key=lambda group: -max(energy[i] for i in group))
        columns = [i for group in groups for i in sorted(group, key=lambda i: -energy[i])]
    elif act_order:
        columns = sorted(columns, key=lambda i: -energy[i])
        if act_order is True:
            groups = [columns[start : start + group_size] for start in range(0, len(energy), group_size)]

    def grids() -> list[Any]:
        return [fit_grid(weight[:, group].t(), bits, symmetric=True) for group in groups]

    fitted, quantised, seen = grids(), torch.empty_like(weight), set()
    for column in columns:
        number = next(number for number, group in enumerate(groups) if column in group)
        if act_order != "static_groups" and number not in seen:
            seen.add(number)
            fitted[number] = grids()[number]
        grid = fitted[number]
        quantised[:, column] = grid.values(grid.codes(weight[:, column]))
        error = (weight[:, column] - quantised[:, column]) / inverse[column, column]
        weight -= torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return quantised


@pytest.mark.parametrize("act_order", ORDERS)
def test_agrees_with_the_plain_algorithm(act_order: ActOrder) -> None:
    weight, hessian = random_problem()
    expected = plain_gptq(weight, hessian, 4, 32, act_order)
    found = gptq_quantize(weight, hessian, group_size=32, act_order=act_order).dequantize().double()
    rows = (expected - found).abs().amax(1) < 1e-4
    assert rows.float().mean() > 0.9  # the others keep their rounded codes, which serve them better
    difference = squared_error(weight, found, hessian) - squared_error(weight, expected, hessian)
    assert difference <= 0


def test_many_outputs_are_cut_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = random_problem(out_features=200)
    whole = gptq_quantize(weight, hessian, group_size=32)
    monkeypatch.setattr("teco_kernels.quantization.gptq._OUTPUTS_AT_ONCE", 64)
    cut = gptq_quantize(weight, hessian, group_size=32)
    assert math.isclose(cut.error, whole.error, rel_tol=1e-9)
    for name, tensor in whole.tensors().items():
        assert torch.equal(cut.tensors()[name], tensor), name


def test_act_order_groups_by_energy() -> None:
    weight, hessian = random_problem()
    quantised = gptq_quantize(weight, hessian, group_size=32, act_order=True)
    energy = hessian.diagonal()
    assert torch.bincount(quantised.g_idx).tolist() == [32, 32, 32]
    assert energy[quantised.g_idx == 0].min() >= energy[quantised.g_idx == 1].max()


@pytest.mark.parametrize("act_order", ["static_groups", "group_aware"])
def test_orders_that_keep_neighbours_in_a_group(act_order: ActOrder) -> None:
    """And gain by the order: on inputs whose energies differ, and lie scattered."""
    weight, hessian = random_problem(in_features=192)
    scattered = torch.randperm(192, generator=torch.Generator().manual_seed(1))
    hessian = hessian[scattered][:, scattered]
    options: dict[str, Any] = {"group_size": 32, "symmetric": False}
    plain, ordered = (gptq_quantize(weight, hessian, act_order=order, **options) for order in (False, act_order))
    assert torch.equal(ordered.g_idx, plain.g_idx)
    assert math.isclose(ordered.rounding_error, plain.rounding_error)
    assert ordered.error < plain.error


def test_group_aware_order() -> None:
    energy = torch.tensor([1.0, 2.0, 3.0, 3.0, 9.0, 1.0])
    factor = HessianFactor.from_hessian(energy.diag(), act_order="group_aware", group_size=2)
    assert factor.order.tolist() == [4, 5, 2, 3, 1, 0]
    with pytest.raises(ValueError, match="group_size: expected -1 or a divisor of 6 input features, got None"):
        HessianFactor.from_hessian(energy.diag(), act_order="group_aware")
    weight, hessian = random_problem()
    factor = HessianFactor.from_hessian(hessian, act_order="group_aware", group_size=32)
    with pytest.raises(ValueError, match="group_size: expected 32, for which the Hessian's factor was ordered, got 96"):
        gptq_quantize(weight, factor, group_size=-1)


def test_static_groups_have_the_grids_of_rounding() -> None:
    weight, hessian = random_problem()
    options: dict[str, Any] = {"group_size": 32, "symmetric": False}
    quantised, rounded = (
        gptq_quantize(weight, hessian, act_order="static_groups", **options),
        round_to_nearest(weight, **options),
    )
    assert torch.equal(quantised.scales, rounded.scales)
    assert torch.equal(quantised.qzeros, rounded.qzeros)


def test_dead_inputs() -> None:
    weight, hessian = random_problem()
    hessian[5] = hessian[:, 5] = 0
    quantised = gptq_quantize(weight, hessian, group_size=32)
    assert (quantised.dequantize()[:, 5] == 0).all()
    assert gptq_quantize(weight, torch.zeros_like(hessian), group_size=32).error == 0


def test_dampening_grows_until_the_factorisation_succeeds() -> None:
    weight, hessian = random_problem(tokens=3)
    assert gptq_quantize(weight, hessian, group_size=32, dampening=0.0).dampening > 0
    with pytest.raises(ValueError, match="hessian: expected a positive semidefinite matrix"):
        HessianFactor.from_hessian(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))


def test_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = random_problem()
    one, other = (gptq_quantize(weight, hessian * factor, group_size=32) for factor in (1, 2.0**20))
    assert torch.equal(one.qweight, other.qweight)


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("zero_point_format", ["v1", "v2"])
@pytest.mark.parametrize("bits", BITS)
def test_operators_read_the_result(bits: int, zero_point_format: Any, symmetric: bool, act_order: ActOrder) -> None:
    weight, hessian = random_problem()
    quantised = gptq_quantize(
        weight,
        hessian,
        bits=bits,
        group_size=32,
        symmetric=symmetric,
        act_order=act_order,
        zero_point_format=zero_point_format,
    )
    packed = GPTQWeight.from_checkpoint(**quantised.tensors(), bits=bits, zero_point_format=zero_point_format)
    assert torch.equal(packed.dequantize().t(), quantised.dequantize())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(8, 96, dtype=torch.int32)}, "weight: expected a floating dtype, got int32"),
        ({"weight": torch.zeros(96)}, r"weight: expected shape \[out_features, in_features\], got \[96\]"),
        ({"weight": torch.zeros(7, 96)}, "expected out_features"),
        ({"weight": torch.full((8, 96), float("nan"))}, "weight: expected finite values"),
        ({"weight": torch.full((8, 96), 1e7)}, "scale fp16 can hold"),
        ({"bits": 5}, r"bits: expected one of \(2, 3, 4, 8\), got 5"),
        ({"group_size": 36}, "group_size: expected -1 or a divisor of 96 input features, got 36"),
        ({"group_size": 0}, "group_size"),
        ({"hessian": torch.eye(95)}, r"hessian: expected shape \[96, 96\], got \[95, 95\]"),
        ({"hessian": torch.eye(96) * float("nan")}, "hessian: expected finite values"),
        ({"hessian": -torch.eye(96)}, "hessian: expected a positive semidefinite matrix"),
        ({"dampening": -1.0}, "dampening: expected 0 to 1, got -1"),
        ({"act_order": "random"}, r"act_order: expected one of \(False, True, 'static_groups', 'group_aware'\), got"),
        ({"refine_sweeps": -1}, "refine_sweeps: expected 0 or more, got -1"),
        ({"block_size": 0}, "block_size: expected a positive number, got 0"),
        ({"zero_point_format": "v3"}, "zero_point_format"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"weight": torch.ones(8, 96), "hessian": torch.eye(96), "group_size": 32, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        gptq_quantize(**arguments)


@pytest.mark.parametrize("zero_point_format", ["v1", "v2"])
@pytest.mark.parametrize("bits", BITS)
def test_operators_read_the_ends_of_zero_points(bits: int, zero_point_format: Any) -> None:
    """v2 holds 0 to ``2**bits - 1``, v1 one more of each; no field takes from its neighbour or gives to it."""
    first = 1 if zero_point_format == "v1" else 0
    zeros = torch.tensor([[first, 2**bits - 1 + first] * 16, [2**bits - 1 + first, first] * 16])
    codes = torch.arange(64 * 32).view(64, 32).mul(7).remainder(2**bits).to(torch.uint8)
    scales = torch.full((2, 32), 0.5).half()
    weight = GPTQWeight.from_checkpoint(
        pack_rows(codes, bits),
        pack_zeros(zeros, bits, zero_point_format),
        scales,
        bits=bits,
        zero_point_format=zero_point_format,
    )
    expected = 0.5 * (codes.float() - zeros.repeat_interleave(32, 0))
    assert torch.equal(weight.dequantize(), expected)


# Real layers


@pytest.fixture(scope="module")
def real_layers(default_gguf: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights of two layers of SmolLM2, and the Hessians of their inputs on 1024 tokens of Wikipedia."""
    source = load_source(default_gguf)
    config, found = source.config, []
    cos_sin = cos_sin_cache(config.head_dim, 256, config.rope_theta, config.rope_scaling)
    ids = token_windows(source.tokenizer.encode(calibration_text()[:20_000]), 4, 256)
    with torch.inference_mode():
        batch = Activations(source.tensor("model.embed_tokens.weight").float()[ids])
        for index in range(3):
            layer = TorchLayer(
                config, index, lambda name: (source.tensor(f"{name}.weight"), None), source.tensor, cos_sin
            )
            for stage, names in enumerate(STAGES):
                hessian = Hessian(layer.weights[names[0]].shape[1])
                hessian.add(layer.stage_input(stage, batch))
                if index in (0, 2):
                    found.append((layer.weights[names[-1]], hessian.matrix()))
                batch = layer.advance(stage, batch)
    return found


@pytest.mark.model
@pytest.mark.parametrize(("bits", "act_order"), [(4, False), (3, "group_aware"), (2, "static_groups"), (8, True)])
def test_real_layers(bits: int, act_order: ActOrder, real_layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for weight, hessian in real_layers:
        weight = weight[:192]
        options: dict[str, Any] = {"bits": bits, "group_size": 64, "symmetric": False}
        rounded = squared_error(weight, round_to_nearest(weight, **options).dequantize(), hessian)
        factor = HessianFactor.from_hessian(hessian, act_order=act_order, group_size=64)
        quantised, again = (gptq_quantize(weight, factor, block_size=size, **options) for size in (64, 48))
        if act_order is not True:
            assert squared_error(weight, quantised.dequantize(), hessian) < 0.7 * rounded
        assert quantised.error < 0.85 * quantised.rounding_error
        assert torch.equal(again.qweight, quantised.qweight)


# Calibration


def test_windows_are_spread_over_the_text() -> None:
    windows = token_windows(list(range(100)), 4, 10)
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    assert windows[3].tolist() == list(range(90, 100))
    assert token_windows(list(range(10)), 1, 10).tolist() == [list(range(10))]
    with pytest.raises(ValueError, match="expected at least 10 tokens, got 9"):
        token_windows(list(range(9)), 1, 10)


def test_hessian_is_a_mean() -> None:
    x = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(8)
    for part in x:
        hessian.add(part)
    rows = x.view(-1, 8).double()
    assert torch.allclose(hessian.matrix(), 2 / 150 * rows.t() @ rows, rtol=1e-5)


@pytest.mark.parametrize("act_order", ORDERS)
def test_correction_is_least_squares(act_order: ActOrder) -> None:
    """With all of it applied, and no dampening to speak of, what is left of the drift has nothing to do with x."""
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(300, 32, generator=generator)
    x = originals + 0.3 * torch.randn(300, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    weight = torch.randn(8, 32, generator=generator).double()
    hessian, drift = Hessian(32), Drift(32)
    hessian.add(x)
    drift.add(originals, x)
    factor = HessianFactor.from_hessian(hessian.matrix(), act_order=act_order, dampening=1e-9, group_size=8)
    corrected = weight + weight @ factor.correction(drift.matrix())
    expected = torch.linalg.lstsq(x.double(), originals.double() @ weight.t()).solution.t()
    assert torch.allclose(corrected, expected, rtol=1e-4, atol=1e-4)


# Whole models

VOCABULARY = 96


def tiny_model(path: Path, family: str = "llama", **changes: Any) -> Path:
    """A random model of two layers with a tokenizer of single bytes."""
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "torch_dtype": "float32",
        **changes,
    }
    generator = torch.Generator().manual_seed(7)

    def linear(out_features: int, in_features: int) -> torch.Tensor:
        return torch.randn(out_features, in_features, generator=generator) / in_features**0.5

    tensors = {"model.embed_tokens.weight": linear(VOCABULARY, 64), "model.norm.weight": torch.ones(64)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = linear(VOCABULARY, 64)
    for layer in ("model.layers.0.", "model.layers.1."):
        sizes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
        for name, shape in sizes.items():
            tensors[f"{layer}self_attn.{name}_proj.weight"] = linear(*shape)
            if family == "qwen2" and name != "o":
                tensors[f"{layer}self_attn.{name}_proj.bias"] = linear(shape[0], 1).flatten()
        for name, shape in {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}.items():
            tensors[f"{layer}mlp.{name}_proj.weight"] = linear(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = 1 + 0.1 * linear(64, 1).flatten()
        if family == "qwen3":
            for name in ("q_norm", "k_norm"):
                tensors[f"{layer}self_attn.{name}.weight"] = 1 + 0.1 * linear(16, 1).flatten()
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    words = tokenizers.Tokenizer(models.WordLevel({chr(32 + i): i for i in range(VOCABULARY)}, unk_token=" "))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    Tokenizer(words, special_tokens={"eos_token": " "}).save(path)
    return path


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


TINY = QuantizationSettings(group_size=32, head_group_size=32, num_sequences=8, sequence_length=32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_forward_pass_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    changes = {"sliding_window": 8} if family == "mistral" else {}
    path = tiny_model(tmp_path / "model", family, **changes)
    ids = tokens(64)
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        batch = torch.tensor(ids).view(2, 32)
        expected = math.exp(model(batch, labels=batch).loss.item())
    assert math.isclose(perplexity(path, ids, window=32), expected, rel_tol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_bits": None},
        {"symmetric": False, "act_order": True, "clip_search": True},
        {"bits": 8, "group_size": -1},
        {"bits": 2, "act_order": "group_aware", "refine_sweeps": 1},
        {"bits": 3, "act_order": "static_groups"},
        {"asymmetric": 0.5},
    ],
    ids=["default", "dense_head", "all_options", "8bit", "group_aware", "static_groups", "asymmetric"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_model_end_to_end(tmp_path: Path, changes: dict[str, Any], tied: bool) -> None:
    path = tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    options = QuantizationSettings(**{**vars(TINY), **changes})
    out = tmp_path / "made" / "quantised"
    reports = quantize_model(path, out, options, calibration=tokens(1000), use_tqdm=False)

    assert len(reports) == 14 + (options.head_bits is not None)
    assert all(0 < report.error <= report.rounding_error < 1 for report in reports)
    source = load_source(out)
    quantization = source.quantization_config
    assert quantization is not None
    expected = {
        "quant_method": "gptq",
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.symmetric,
    }
    expected |= {"desc_act": options.act_order is True, "checkpoint_format": "gptq"}
    assert quantization | expected == quantization
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    assert source.has("lm_head.weight") == (not tied and options.head_bits is None)
    assert source.tensor("model.embed_tokens.weight").dtype == torch.float16
    assert source.tokenizer.encode("ab") == load_source(path).tokenizer.encode("ab")
    loader = WeightLoader(source, torch.float32, "exact")
    qkv = loader.linear([f"model.layers.1.self_attn.{name}_proj" for name in "qkv"], 64, [64, 32, 32], bias=False)
    assert len(qkv.weights) == 1  # same input, same order of inputs: merged into one matmul
    if options.head_bits is not None:
        (head,) = loader.linear(["lm_head"], 64, [VOCABULARY], bias=False).weights
        assert isinstance(head, GPTQWeight)
        assert head.bits == 8
    # Random weights have nothing to lose but that they are these weights.
    before, after = (perplexity(model, tokens(512, 1), window=32) for model in (path, out))
    assert abs(math.log(after / before)) < 0.1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_is_rounded(tmp_path: Path, tied: bool, bits: int) -> None:
    """To nearest; a tied one is also the head, and then nothing else is."""
    path, out = tiny_model(tmp_path / "model", tie_word_embeddings=tied), tmp_path / "out"
    if tied:  # which some files hold twice
        tensors = load_file(path / "model.safetensors")
        save_file(
            tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path / "model.safetensors"
        )
    # The rule of a layer is none of the embedding's.
    settings = replace(TINY, embedding_bits=bits, head_bits=bits, layer_bits={".*": 8}, asymmetric=0.5)
    reports = quantize_model(path, out, settings, calibration=tokens(1000), use_tqdm=False)
    assert [report.name for report in reports[:: len(reports) - 1]] == [
        "model.embed_tokens",
        "model.layers.1.mlp.down_proj" if tied else "lm_head",
    ]
    assert reports[0].bits == bits
    assert reports[0].ratio == 1
    weight = load_source(path).tensor("model.embed_tokens.weight")
    rounded = round_to_nearest(weight, bits=bits, group_size=32)
    assert math.isclose(reports[0].error, relative_error(rounded.dequantize(), weight), rel_tol=1e-4)
    source = load_source(out)
    assert {name for name in source.names() if name.startswith("model.embed_tokens")} == {
        f"model.embed_tokens.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert tied != any(name.startswith("lm_head") for name in source.names())
    for name, tensor in rounded.tensors().items():
        assert torch.equal(source.tensor(f"model.embed_tokens.{name}"), tensor)
    llm = LLM(out, max_model_len=64, gptq_activation="exact")
    held = llm.engine.model.embedding
    assert isinstance(held, GPTQWeight)
    assert torch.equal(held.dequantize().t(), rounded.dequantize())
    ids = tokens(32, 1)
    expected = perplexity(out, ids, window=32)
    assert math.isclose(math.exp(-sum(llm.score(ids)) / 31), expected, rel_tol=1e-4)
    assert abs(math.log(expected / perplexity(path, ids, window=32))) < 0.2


def test_layers_see_the_rounded_embedding(tmp_path: Path) -> None:
    """Their Hessian is that of a model which came with the rounded embedding."""
    path, rounded = tiny_model(tmp_path / "model"), tiny_model(tmp_path / "rounded")
    tensors = load_file(path / "model.safetensors")
    embedding = round_to_nearest(tensors["model.embed_tokens.weight"], bits=2, group_size=32).dequantize()
    save_file(tensors | {"model.embed_tokens.weight": embedding}, rounded / "model.safetensors")
    one, other = replace(TINY, head_bits=None, embedding_bits=2), replace(TINY, head_bits=None)
    quantize_model(path, tmp_path / "one", one, calibration=tokens(1000), use_tqdm=False)
    quantize_model(rounded, tmp_path / "other", other, calibration=tokens(1000), use_tqdm=False)
    made, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    layers = [name for name in expected if name.startswith("model.layers.")]
    assert len(layers) == 2 * (7 * 4 + 2)
    assert all(torch.equal(made[name], expected[name]) for name in layers)


def test_layers_with_bits_of_their_own(tmp_path: Path) -> None:
    path, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    settings = replace(TINY, symmetric=False, layer_bits={r".*\.v_proj$": 8, r"model\.layers\.1\.mlp": 8})
    reports = quantize_model(path, out, settings, calibration=tokens(1000), use_tqdm=False)
    eight = {report.name for report in reports if report.error < 0.01}
    mlp = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert eight == {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "lm_head"} | mlp
    loader = WeightLoader(load_source(out), torch.float32, "exact")
    qkv = loader.linear([f"model.layers.1.self_attn.{name}_proj" for name in "qkv"], 64, [64, 32, 32], bias=False)
    assert [(weight.bits, weight.out_features) for weight in qkv.weights] == [(4, 96), (8, 32)]  # type: ignore[union-attr]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    parts = [
        loader.linear([f"model.layers.1.self_attn.{name}_proj"], 64, [size], bias=False)(x)
        for name, size in (("q", 64), ("k", 32), ("v", 32))
    ]
    assert torch.equal(qkv(x), torch.cat(parts, dim=-1))
    with pytest.raises(ValueError, match=r"v_proj: bits: expected one of \(2, 3, 4, 8\), got 5"):
        quantize_model(path, tmp_path / "bad", replace(TINY, layer_bits={".*v_proj": 5}), calibration=tokens(1000))


def test_biases_and_dtype_are_kept(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model", "qwen2")
    tensors = load_file(path / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path / "model.safetensors")
    quantize_model(path, tmp_path / "out", TINY, calibration=tokens(1000), use_tqdm=False)
    source = load_source(tmp_path / "out")
    bias = source.tensor("model.layers.0.self_attn.q_proj.bias")
    assert torch.equal(bias, tensors["model.layers.0.self_attn.q_proj.bias"].bfloat16())
    assert source.raw_config["torch_dtype"] == "bfloat16"


def test_text_is_tokenised_with_the_model(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model")
    text = "".join(chr(32 + token) for token in tokens(1000))
    for name, calibration in (("text", text), ("ids", load_source(path).tokenizer.encode(text))):
        quantize_model(path, tmp_path / name, TINY, calibration=calibration, use_tqdm=False)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("text", "ids"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


KILLED = replace(TINY, asymmetric=0.5, embedding_bits=8)


def test_goes_on_after_being_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal that no process can catch, in the middle of the second layer."""
    path, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    quantize_model(path, tmp_path / "whole", KILLED, calibration=tokens(1000), use_tqdm=False)
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_quantization import KILLED, tokens
from teco_kernels.quantization import model, quantize_model

torch.set_num_threads({torch.get_num_threads()})
quantise = model._quantise
def kill_at_last(name, *arguments):
    if name == "model.layers.1.self_attn.o_proj":
        os.kill(os.getpid(), signal.SIGKILL)
    return quantise(name, *arguments)
model._quantise = kill_at_last
quantize_model({str(path)!r}, {str(out)!r}, KILLED, calibration=tokens(1000), use_tqdm=False)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not out.exists()
    (folder,) = [entry for entry in (tmp_path / ".out.unfinished").iterdir() if entry.is_dir()]
    assert sorted(file.name for file in folder.iterdir()) == ["embedding.safetensors", "layer-0.safetensors"]

    made: list[str] = []
    quantise = model._quantise

    def watch(name: str, *arguments: Any) -> Any:
        made.append(name)
        return quantise(name, *arguments)

    monkeypatch.setattr(model, "_quantise", watch)
    other = replace(KILLED, symmetric=False)  # not the same run: nothing is taken over, nothing taken away

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("teco_kernels.decoder.tokenizer.Tokenizer.save", interrupt)  # when the tensors are written
        with pytest.raises(KeyboardInterrupt):
            quantize_model(path, out, other, calibration=tokens(1000), use_tqdm=False)
    assert len(made) == 14
    assert not out.exists()
    made.clear()
    reports = quantize_model(path, out, KILLED, calibration=tokens(1000), use_tqdm=False)
    assert len(made) == 7
    assert all("layers.0" not in name for name in made)
    assert len(reports) == 15
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "out", "whole"]
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_what_a_finished_layer_belongs_to(tmp_path: Path) -> None:
    path, windows = tiny_model(tmp_path / "model"), token_windows(tokens(100), 2, 32)
    keys = {fingerprint(load_source(path), windows, vars(TINY))}
    assert fingerprint(load_source(path), windows.clone(), vars(TINY)) in keys
    keys.add(fingerprint(load_source(path), windows, vars(TINY) | {"dampening": 0.02}))
    rules = {".*v_proj": 8, ".*self_attn": 3}  # the first that matches counts
    keys.add(fingerprint(load_source(path), windows, vars(TINY) | {"layer_bits": rules}))
    keys.add(fingerprint(load_source(path), windows, vars(TINY) | {"layer_bits": dict(reversed(rules.items()))}))
    keys.add(fingerprint(load_source(path), windows + 1, vars(TINY)))
    keys.add(fingerprint(load_source(tiny_model(tmp_path / "other", rope_theta=1e5)), windows, vars(TINY)))
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, path / "model.safetensors")
    keys.add(fingerprint(load_source(path), windows, vars(TINY)))
    assert len(keys) == 7


def test_one_process_at_a_time_and_damaged_parts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with unfinished(out, "key") as finished:
        with pytest.raises(ValueError, match="out: another process is making it"), unfinished(out, "key"):
            pass
        part = Part([LayerReport("a", 0.1, 0.2, 0.01)], {"a.qweight": torch.arange(4)})
        finished.write("layer-0", part)
        read = finished.read("layer-0")
        assert read is not None
        assert read.reports == part.reports
        assert torch.equal(read.tensors["a.qweight"], part.tensors["a.qweight"])
        file = tmp_path / ".out.unfinished/key/layer-0.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
        assert finished.read("layer-0") is None
    assert not list(tmp_path.iterdir())


def test_report(tmp_path: Path) -> None:
    settings = replace(TINY, layer_bits={".*v_proj": 8})
    reports = quantize_model(
        tiny_model(tmp_path / "model"), tmp_path / "out", settings, calibration=tokens(1000), use_tqdm=False
    )
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert report["settings"]["layer_bits"] == {".*v_proj": 8}
    assert report["peak_memory_bytes"] > 1 << 20
    assert [LayerReport(**{k: v for k, v in row.items() if k != "ratio"}) for row in report["matrices"]] == reports
    assert math.isclose(report["seconds"], sum(row.seconds for row in reports), abs_tol=1e-3)
    assert {row["bits"] for row in report["matrices"] if "v_proj" in row["name"]} == {8}
    assert all(row["seconds"] > 0 and 0 < row["ratio"] <= 1 for row in report["matrices"])
    assert list(by_layer(reports)) == ["0", "1", "lm_head"]
    draw(reports, "tiny", tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, r"model.layers.0.self_attn.q_proj: bits: expected one of"),
        ({"group_size": 40}, r"model.layers.0.self_attn.q_proj: group_size: expected -1 or a divisor of 64"),
        ({"group_size": 64}, r"model.layers.0.mlp.down_proj: group_size: expected -1 or a divisor of 96"),
        ({"layer_bits": {r".*1\.mlp\.up": 5}}, r"model.layers.1.mlp.up_proj: bits: expected one of"),
        ({"layer_bits": {"lm_head": 4}}, "layer_bits: expected a rule for layers such as .*, 'lm_head' matches none"),
        ({"layer_bits": {"(": 4}}, r"layer_bits: expected a regular expression, got '\('"),
        ({"act_order": "yes"}, "act_order: expected one of"),
        ({"dampening": 2.0}, "dampening: expected 0 to 1, got 2"),
        ({"asymmetric": -0.5}, "asymmetric: expected 0 to 1, got -0.5"),
        ({"num_sequences": 0}, "num_sequences: expected a positive number, got 0"),
        ({"head_bits": 5}, "head_bits: expected one of .*, or None to leave the head, got 5"),
        ({"embedding_bits": 5}, "embedding_bits: expected one of .*, or None to keep the embedding, got 5"),
        ({"embedding_bits": 4}, "head_bits: expected 4 like embedding_bits, or None, since head and embedding of this"),
        (
            {"embedding_bits": 8, "head_bits": None, "head_group_size": 48},
            "model.embed_tokens: head_group_size: expected -1 or a divisor of 64 input features, got 48",
        ),
        ({"head_group_size": 48}, "lm_head: head_group_size: expected -1 or a divisor of 64 input features, got 48"),
    ],
)
def test_settings_that_do_not_fit_are_told_at_once(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes).check(load_source(tiny_model(tmp_path / "model")).config)


def test_model_refuses(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: exists already"):
        quantize_model(path, path, TINY, calibration=tokens(1000))
    with pytest.raises(ValueError, match="expected at least 32 tokens, got 31"):
        quantize_model(path, tmp_path / "out", TINY, calibration=tokens(31), use_tqdm=False)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: group_size: expected -1 or a divisor"):
        quantize_model(path, tmp_path / "out", QuantizationSettings(), calibration=tokens(9999), use_tqdm=False)
    quantize_model(path, tmp_path / "out", TINY, calibration=tokens(1000), use_tqdm=False)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(tmp_path / "out", tmp_path / "again", TINY, calibration=tokens(1000))
    with pytest.raises(ValueError, match="expected at least a window of 1024 tokens"):
        perplexity(path, tokens(10))
