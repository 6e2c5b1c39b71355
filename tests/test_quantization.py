"""Quantising a matrix: packing, the algorithm's properties, and what it learns from text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teco_kernels.assets import calibration_text
from teco_kernels.decoder.loader import load_source
from teco_kernels.ops import GPTQWeight
from teco_kernels.ops.packing import BITS, pack_rows, pack_zeros, unpack_rows, unpack_zeros
from teco_kernels.ops.rope import cos_sin_cache
from teco_kernels.quantization import (
    HessianFactor,
    gptq_quantize,
    round_to_nearest,
)
from teco_kernels.quantization.calibration import Drift, Hessian, token_windows
from teco_kernels.quantization.gptq import ActOrder
from teco_kernels.quantization.grid import fit_grid
from teco_kernels.quantization.refine import refine
from teco_kernels.quantization.torch_layer import STAGES, Activations, TorchLayer

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
