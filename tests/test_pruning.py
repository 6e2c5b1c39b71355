"""Pruning: masks, SparseGPT against the paper's algorithm, jointly with quantisation, and whole models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantization import random_problem, squared_error
from test_quantize_model import TINY, tiny_model, tokens

from teco_kernels.decoder import LLM, SamplingParams
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.weights import WeightLoader
from teco_kernels.ops import DenseWeight, Sparse24Weight
from teco_kernels.quantization import (
    HessianFactor,
    PruningSettings,
    gptq_quantize,
    magnitude_mask,
    prune_model,
    quantize_model,
    round_to_nearest,
    sparsegpt_prune,
    wanda_mask,
)
from teco_kernels.quantization.perplexity import perplexity
from teco_kernels.quantization.sparsity import Sparsity, SparsityLike
from teco_kernels.quantization.stages import embed, stages, torch_layers

SPARSITIES: tuple[SparsityLike, ...] = (0.1, 0.5, 0.8, "2:4", "4:8", "1:4")


def zeros_in_groups(mask: torch.Tensor, size: int) -> set[int]:
    return set((~mask).unflatten(-1, (-1, size)).sum(-1).flatten().tolist())


# How many


@pytest.mark.parametrize(
    ("text", "share", "pattern"),
    [("2:4", 0.5, (2, 4)), ("1:4", 0.75, (1, 4)), ("0.3", 0.3, None), (0, 0.0, None), ("4:4", 0.0, (4, 4))],
)
def test_sparsity_is_a_share_or_a_pattern(text: SparsityLike, share: float, pattern: tuple[int, int] | None) -> None:
    assert Sparsity.parse(text) == Sparsity(share, pattern)


@pytest.mark.parametrize("text", ["half", "5:4", "0:4", "2:", "2:4:8", 1.5, -0.1, float("nan")])
def test_other_sparsities_are_refused(text: SparsityLike) -> None:
    with pytest.raises(
        ValueError, match=r"^sparsity: expected a share of 0 to 1, or n:m with n of m weights kept, got"
    ):
        Sparsity.parse(text)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), sparsity=st.sampled_from(SPARSITIES), outputs=st.integers(1, 40))
def test_masks_keep_exactly_as_many_as_they_should(seed: int, sparsity: SparsityLike, outputs: int) -> None:
    weight, hessian = random_problem(outputs, 96, 60, seed)
    parsed = Sparsity.parse(sparsity)
    magnitude, wanda = magnitude_mask(weight, sparsity=sparsity), wanda_mask(weight, hessian, sparsity=sparsity)
    pruned = sparsegpt_prune(weight, hessian, sparsity=sparsity, mask_block_size=32) != 0
    if parsed.pattern is not None:
        kept, size = parsed.pattern
        assert all(zeros_in_groups(mask, size) == {size - kept} for mask in (magnitude, wanda, pruned))
    else:
        assert (~magnitude).sum() == round(parsed.share * weight.numel())
        assert set((~wanda).sum(1).tolist()) == {round(parsed.share * 96)}
        assert {(~block).sum().item() for block in pruned.split(32, dim=1)} == {round(parsed.share * 32 * outputs)}


def test_masks_keep_the_highest_scores() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.5, 0.1, 0.2, 0.4]])
    hessian = torch.diag(torch.tensor([1.0, 1.0, 9.0, 4.0, 1.0, 1.0, 1.0, 1.0]))  # |w| ||x||: 1 4 6 6 .5 .1 .2 .4
    assert magnitude_mask(weight, sparsity="2:4").int().tolist() == [[0, 1, 0, 1, 1, 0, 0, 1]]
    assert magnitude_mask(weight, sparsity=0.5).int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert wanda_mask(weight, hessian, sparsity="2:4").int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 1]]
    assert wanda_mask(weight, hessian, sparsity=0.75).int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 0]]


# SparseGPT


def plain_sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, sparsity: str) -> torch.Tensor:
    """The paper's algorithm column by column, with H^-1 of the columns left updated by Gaussian elimination."""
    kept, size = map(int, sparsity.split(":"))
    weight = weight.double().clone()
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)))
    for column in range(weight.shape[1]):
        if column % size == 0:
            # The error of a weight's removal, its column being the first that is left: of each in its turn.
            turns, scores = inverse, []
            for place in range(column, column + size):
                scores.append(weight[:, place].square() / turns[place, place])
                turns = turns - torch.outer(turns[:, place], turns[place]) / turns[place, place]
            lowest = torch.stack(scores, dim=1).argsort(dim=1, stable=True)[:, : size - kept]
            prune = torch.zeros(len(weight), size, dtype=torch.bool).scatter_(1, lowest, True)
        error = torch.where(prune[:, column % size], weight[:, column], 0.0) / inverse[column, column]
        weight -= torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return weight


@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "3:4", "48:96"])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_the_plain_algorithm(sparsity: str, seed: int) -> None:
    weight, hessian = random_problem(seed=seed)
    expected = plain_sparsegpt(weight, hessian, sparsity)
    pruned = sparsegpt_prune(weight, hessian, sparsity=sparsity)
    assert torch.equal(pruned != 0, expected.abs() > 1e-9)
    assert torch.allclose(pruned.double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sparsity=st.sampled_from(SPARSITIES),
    tokens=st.sampled_from([3, 60, 400]),
    outputs=st.sampled_from([4, 32]),
)
def test_error_is_below_that_of_magnitude_pruning(seed: int, sparsity: SparsityLike, tokens: int, outputs: int) -> None:
    weight, hessian = random_problem(outputs, 96, tokens, seed)
    error = squared_error(weight, sparsegpt_prune(weight, hessian, sparsity=sparsity), hessian)
    assert error < squared_error(weight, weight * magnitude_mask(weight, sparsity=sparsity), hessian)


@pytest.mark.model
def test_methods_rank_as_in_the_papers_on_real_layers(default_gguf: Path) -> None:
    source = load_source(default_gguf)
    ids = source.tokenizer.encode("The capital of France is Paris, and the capital of Germany is Berlin. " * 20)
    windows = torch.tensor(ids[:256]).view(2, 128)
    with torch.inference_mode():
        first_layer = islice(torch_layers(source, 128), 1)
        for stage in stages(first_layer, embed(source, windows)):
            factor = HessianFactor.from_hessian(stage.hessian)
            for name in stage.names:
                weight = stage.weight(name)
                for sparsity in (0.5, "2:4"):
                    errors = [
                        squared_error(weight, pruned, stage.hessian)
                        for pruned in (
                            sparsegpt_prune(weight, factor, sparsity=sparsity),
                            weight * wanda_mask(weight, stage.hessian, sparsity=sparsity),
                            weight * magnitude_mask(weight, sparsity=sparsity),
                        )
                    ]
                    assert errors == sorted(errors), (name, sparsity)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_methods_rank_as_in_the_papers(sparsity: SparsityLike) -> None:
    weight, hessian = random_problem()
    errors = [
        squared_error(weight, pruned, hessian)
        for pruned in (
            sparsegpt_prune(weight, hessian, sparsity=sparsity),
            weight * wanda_mask(weight, hessian, sparsity=sparsity),
            weight * magnitude_mask(weight, sparsity=sparsity),
        )
    ]
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < 0.9 * errors[2]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_identity_hessian_is_magnitude_pruning(sparsity: SparsityLike) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    pruned = sparsegpt_prune(weight, torch.eye(96), sparsity=sparsity)
    assert torch.equal(pruned, weight * magnitude_mask(weight, sparsity=sparsity))
    assert torch.equal(wanda_mask(weight, torch.eye(96), sparsity="2:4"), magnitude_mask(weight, sparsity="2:4"))


@pytest.mark.parametrize("sparsity", [0.0, "4:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_sparsity_changes_nothing(sparsity: SparsityLike, dtype: torch.dtype) -> None:
    weight, hessian = random_problem()
    hessian[5] = hessian[:, 5] = 0  # an input that is always 0 keeps its weights too
    weight = weight.to(dtype)
    assert torch.equal(sparsegpt_prune(weight, hessian, sparsity=sparsity), weight)
    assert magnitude_mask(weight, sparsity=sparsity).all()
    assert wanda_mask(weight, hessian, sparsity=sparsity).all()


def test_everything_pruned_is_zero() -> None:
    weight, hessian = random_problem()
    assert not sparsegpt_prune(weight, hessian, sparsity=1.0).any()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    block_size=st.sampled_from([1, 5, 16, 33, 96, 1000]),
    sparsity=st.sampled_from(SPARSITIES),
)
def test_block_size_does_not_matter(seed: int, block_size: int, sparsity: SparsityLike) -> None:
    weight, hessian = random_problem(seed=seed)
    one, other = (sparsegpt_prune(weight, hessian, sparsity=sparsity, block_size=size) for size in (64, block_size))
    assert torch.equal(one != 0, other != 0)
    assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)


def test_dead_inputs_go_first() -> None:
    weight, hessian = random_problem()
    hessian[8:24] = hessian[:, 8:24] = 0
    weight[:, 8:24] *= 100
    for sparsity in (0.5, "2:4"):
        pruned = sparsegpt_prune(weight, hessian, sparsity=sparsity)
        assert (pruned[:, 8:24] == 0).all() == (sparsity == 0.5)
        assert pruned.isfinite().all()


def test_any_order_of_inputs_will_do_without_a_pattern() -> None:
    weight, hessian = random_problem()
    factor = HessianFactor.from_hessian(hessian, act_order=True)
    pruned = sparsegpt_prune(weight, factor, sparsity=0.5)
    assert (pruned == 0).sum() == weight.numel() // 2
    magnitude = weight * magnitude_mask(weight, sparsity=0.5)
    assert squared_error(weight, pruned, hessian) < 0.5 * squared_error(weight, magnitude, hessian)
    with pytest.raises(ValueError, match="sparsity: expected an order of inputs that keeps groups of 4 together"):
        sparsegpt_prune(weight, factor, sparsity="2:4")


# Jointly with quantisation


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sparsity=st.sampled_from(SPARSITIES),
    bits=st.sampled_from([3, 4, 8]),
    group_size=st.sampled_from([16, 32, 96]),
    symmetric=st.booleans(),
    refine_sweeps=st.sampled_from([0, 1]),
)
def test_pruned_and_quantised_in_one_pass(
    seed: int, sparsity: SparsityLike, bits: int, group_size: int, symmetric: bool, refine_sweeps: int
) -> None:
    weight, hessian = random_problem(32, 96, 400, seed)
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    quantised = gptq_quantize(weight, hessian, sparsity=sparsity, refine_sweeps=refine_sweeps, **options)
    zeros, parsed = quantised.dequantize() == 0, Sparsity.parse(sparsity)
    if parsed.pattern is not None:
        kept, size = parsed.pattern
        assert (zeros.unflatten(-1, (-1, size)).sum(-1) >= size - kept).all()  # some are rounded to 0 besides
    assert zeros.sum() >= round(parsed.share * weight.numel())
    assert quantised.error <= quantised.rounding_error


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_one_pass_errs_less_than_two(sparsity: SparsityLike) -> None:
    weight, hessian = random_problem()
    joint = gptq_quantize(weight, hessian, group_size=32, sparsity=sparsity).dequantize()
    rounded = round_to_nearest(sparsegpt_prune(weight, hessian, sparsity=sparsity), group_size=32).dequantize()
    assert squared_error(weight, joint, hessian) < 0.95 * squared_error(weight, rounded, hessian)


@pytest.mark.parametrize("act_order", [False, True, "static_groups", "group_aware"])
def test_no_sparsity_is_plain_quantisation(act_order: Any) -> None:
    weight, hessian = random_problem()
    plain, pruned = (
        gptq_quantize(weight, hessian, group_size=32, act_order=act_order, sparsity=sparsity)
        for sparsity in (None, 0.0)
    )
    for name, tensor in plain.tensors().items():
        assert torch.equal(pruned.tensors()[name], tensor), name


def test_eight_bits_cost_little_beside_pruning() -> None:
    weight, hessian = random_problem()
    pruned = sparsegpt_prune(weight, hessian, sparsity="2:4")
    quantised = gptq_quantize(weight, hessian, bits=8, group_size=32, sparsity="2:4").dequantize()
    # Masks are chosen from weights that make up for rounding too: not quite the same ones.
    assert ((pruned == 0) <= (quantised == 0)).float().mean() > 0.95
    assert squared_error(weight, quantised, hessian) < 1.1 * squared_error(weight, pruned, hessian)


# What is refused


def test_settings_are_checked_before_anything_is_computed(tmp_path: Path) -> None:
    path, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    for changes, message in (
        ({"sparsity": "4:2"}, "^sparsity: expected a share of 0 to 1"),
        (
            {"sparsity": "2:5"},
            r"^model\.layers\.0\.self_attn\.q_proj: weight: expected in_features to be a multiple of 5",
        ),
        ({"sparsity": "2:4", "act_order": True}, "^act_order: expected False with a sparsity of 2:4, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_model(path, out, replace(TINY, **changes), calibration=[])  # type: ignore[arg-type]


def test_joint_pass_refuses_patterns_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="weight: expected in_features to be a multiple of 9, got 96"):
        gptq_quantize(torch.ones(8, 96), torch.eye(96), group_size=32, sparsity="5:9")


@pytest.mark.parametrize("prune", [sparsegpt_prune, wanda_mask])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(8, 96, dtype=torch.int32)}, "weight: expected a floating dtype, got int32"),
        ({"weight": torch.zeros(96)}, r"weight: expected shape \[out_features, in_features\], got \[96\]"),
        ({"weight": torch.full((8, 96), float("inf"))}, "weight: expected finite values"),
        ({"hessian": torch.eye(95)}, r"hessian: expected .*9"),
        ({"hessian": torch.eye(96) * float("nan")}, "hessian: expected finite values"),
        ({"sparsity": "5:9"}, "weight: expected in_features to be a multiple of 9, got 96"),
        ({"sparsity": "most"}, "sparsity: expected a share of 0 to 1"),
    ],
)
def test_refuses(prune: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"weight": torch.ones(8, 96), "hessian": torch.eye(96), "sparsity": 0.5, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        prune(**arguments)


@pytest.mark.parametrize("name", ["mask_block_size", "block_size"])
def test_refuses_sizes(name: str) -> None:
    arguments: dict[str, Any] = {"weight": torch.ones(8, 96), "hessian": torch.eye(96), "sparsity": 0.5, name: 0}
    with pytest.raises(ValueError, match=f"^{name}: expected a positive number, got 0"):
        sparsegpt_prune(**arguments)
    with pytest.raises(ValueError, match=f"^{name}: expected a positive number, got 0"):
        gptq_quantize(group_size=32, **arguments)


# Whole models

TINY_PRUNING = PruningSettings(num_sequences=8, sequence_length=32)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_model_end_to_end(tmp_path: Path, method: Any, sparsity: SparsityLike) -> None:
    path, out = tiny_model(tmp_path / "model"), tmp_path / "pruned"
    options = replace(TINY_PRUNING, sparsity=sparsity, method=method)
    reports = prune_model(path, out, options, calibration=tokens(1000), use_tqdm=False)
    assert len(reports) == 14
    assert all(math.isclose(report.sparsity, 0.5, abs_tol=1e-3) and 0 < report.error < 1 for report in reports)
    source = load_source(out)
    assert source.quantization_config is None
    assert source.tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.float16
    assert (source.tensor("model.layers.0.mlp.up_proj.weight") == 0).float().mean() == 0.5
    config = json.loads((out / "config.json").read_text())["sparsity_config"]
    assert config == {
        "format": "dense",
        "sparsity_structure": "2:4" if sparsity == "2:4" else "unstructured",
        "global_sparsity": 0.5,
        "method": method,
    }
    layer = WeightLoader(source, torch.float32, "exact").linear(["model.layers.1.mlp.down_proj"], 96, [64], bias=False)
    assert isinstance(layer.weights[0], Sparse24Weight if sparsity == "2:4" else DenseWeight)
    assert perplexity(out, tokens(512, 1), window=32) < 300


def test_decoder_gives_the_same_packed_and_dense(tmp_path: Path) -> None:
    path, out = tiny_model(tmp_path / "model", "qwen2"), tmp_path / "pruned"
    prune_model(path, out, TINY_PRUNING, calibration=tokens(1000), use_tqdm=False)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [tokens(9, 1), tokens(3, 2)]
    packed = LLM(out, max_model_len=64, kv_cache_memory=1 << 20)
    config = json.loads((out / "config.json").read_text())
    del config["sparsity_config"]
    (out / "config.json").write_text(json.dumps(config))
    dense = LLM(out, max_model_len=64, kv_cache_memory=1 << 20)
    assert packed.metrics()["weight_bytes"] < dense.metrics()["weight_bytes"]
    answers = [
        [a.outputs[0].token_ids for a in llm.generate(prompts, params, use_tqdm=False)] for llm in (packed, dense)
    ]
    assert answers[0] == answers[1]
    assert packed.score(prompts[0]) == dense.score(prompts[0])


def test_weights_that_are_not_what_the_configuration_says(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model", sparsity_config={"format": "dense", "sparsity_structure": "2:4"})
    message = r"safetensors: tensor 'model\.layers\.0\.self_attn\.q_proj\.weight': weight: expected at most 2"
    with pytest.raises(ValueError, match=message):
        LLM(path, max_model_len=64, kv_cache_memory=1 << 20)


def test_model_quantised_and_pruned(tmp_path: Path) -> None:
    path, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    quantize_model(path, out, replace(TINY, sparsity="2:4"), calibration=tokens(1000), use_tqdm=False)
    source = load_source(out)
    assert source.quantization_config is not None
    assert source.quantization_config["meta"]["sparsity"] == "2:4"
    loader = WeightLoader(source, torch.float32, "exact")
    (weight,) = loader.linear(["model.layers.1.mlp.up_proj"], 64, [96], bias=False).weights
    assert ((weight.dequantize().t() == 0).unflatten(-1, (-1, 4)).sum(-1) >= 2).all()
    (head,) = loader.linear(["lm_head"], 64, [96], bias=False).weights
    assert (head.dequantize() == 0).float().mean() < 0.1


def test_model_refuses(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model")
    with pytest.raises(ValueError, match="model: exists already"):
        prune_model(path, path)
    with pytest.raises(ValueError, match="method: expected sparsegpt, wanda or magnitude, got 'random'"):
        prune_model(path, tmp_path / "out", PruningSettings(method="random"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparsity: expected a share of 0 to 1"):
        prune_model(path, tmp_path / "out", PruningSettings(sparsity="4:2"))
    with pytest.raises(ValueError, match="dampening: expected 0 to 1, got -1"):
        prune_model(path, tmp_path / "out", PruningSettings(dampening=-1))
    with pytest.raises(ValueError, match="num_sequences: expected a positive number, got 0"):
        prune_model(path, tmp_path / "out", PruningSettings(num_sequences=0))
    settings = replace(TINY_PRUNING, sparsity="2:5")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: weight: expected in_features to be"):
        prune_model(path, tmp_path / "out", settings, calibration=[], use_tqdm=False)  # before the text is looked at
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
