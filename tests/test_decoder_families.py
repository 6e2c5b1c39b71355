"""Every supported family against transformers on the same random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import is_greedy, logits_of, random_model, reference_logits, relative_error, save_model

from teco_kernels import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [17, 250, 33, 33, 101, 7, 298, 64, 5, 180, 90, 12, 77, 201, 3, 45, 46, 47, 48, 111, 222]
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = ROPE | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, all heads": ("llama", {"num_key_value_heads": 4}),
    "llama, wide heads": ("llama", {"head_dim": 48}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "llama3"}}),
    "llama, yarn": (
        "llama",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 64}},
    ),
    "llama, theta": ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rms_norm_eps": 1e-2}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "qwen3, tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def load(path: Path, **options: Any) -> LLM:
    return LLM(path, max_model_len=128, block_size=4, kv_cache_memory=1 << 20, **options)


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters in another dtype (`model.to` would round the rotary frequencies too)."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_transformers(case: str, tmp_path: Path) -> None:
    family, config = CASES[case]
    model = random_model(family, **config)
    llm = load(save_model(tmp_path, model))
    assert relative_error(logits_of(llm, PROMPT), reference_logits(model, PROMPT)) < 1e-5
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate(PROMPT, params, use_tqdm=False)
    assert is_greedy(model, PROMPT, output.outputs[0].token_ids)


def test_older_configurations_mean_the_same(tmp_path: Path) -> None:
    """Before transformers 5 theta and scaling were two keys, and the kind was called type."""
    model = random_model("llama", rope_parameters=LLAMA3 | {"rope_type": "llama3"})
    new, old = save_model(tmp_path / "new", model), save_model(tmp_path / "old", model)
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    (old / "config.json").write_text(json.dumps(config))
    assert load(old).config == load(new).config


def test_shards_and_one_file_hold_the_same_model(tmp_path: Path) -> None:
    model = random_model()
    one, many = save_model(tmp_path / "one", model), save_model(tmp_path / "many", model, max_shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(load(one), PROMPT), logits_of(load(many), PROMPT))


def test_other_files_beside_the_model_are_not_read(tmp_path: Path) -> None:
    directory = save_model(tmp_path, random_model())
    expected = logits_of(load(directory), PROMPT)
    other = load_file(directory / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in other.items()}, directory / "a_training_state.safetensors")
    save_file({name: tensor + 1 for name, tensor in other.items()}, directory / "original.safetensors")
    assert torch.equal(logits_of(load(directory), PROMPT), expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_computed_in_single_precision(stored: torch.dtype, tmp_path: Path) -> None:
    """The stored numbers are exact in fp32, so nothing but the order of summation may differ."""
    model = rounded(random_model(), stored)
    llm = load(save_model(tmp_path, model))
    assert llm.engine.model.embedding.dtype == stored
    assert relative_error(logits_of(llm, PROMPT), reference_logits(rounded(model, torch.float32), PROMPT)) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 3e-3), ("bfloat16", 2.5e-2)])
def test_half_precision_arithmetic(dtype: str, tolerance: float, tmp_path: Path) -> None:
    model = random_model("qwen3", head_dim=16)
    llm = load(save_model(tmp_path, model), dtype=dtype)
    assert llm.engine.model.embedding.dtype == getattr(torch, dtype)
    expected = reference_logits(rounded(rounded(model, getattr(torch, dtype)), torch.float32), PROMPT)
    assert relative_error(logits_of(llm, PROMPT), expected) < tolerance


@pytest.mark.parametrize("kv_cache_dtype", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_cache_dtypes(kv_cache_dtype: str, tmp_path: Path) -> None:
    model = random_model()
    llm = load(save_model(tmp_path, model), kv_cache_dtype=kv_cache_dtype)
    tolerance = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.5e-2, "int8": 3e-2, "fp8": 0.12}[kv_cache_dtype]
    assert relative_error(logits_of(llm, PROMPT), reference_logits(model, PROMPT)) < tolerance


def test_dtypes_by_the_names_of_other_packages(tmp_path: Path) -> None:
    directory = save_model(tmp_path, random_model())
    for name, short in {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "fp8_e4m3": "fp8"}.items():
        expected = load(directory, kv_cache_dtype=short).engine.cache.dtype
        assert load(directory, kv_cache_dtype=name).engine.cache.dtype == expected
    names = {"float": torch.float32, "half": torch.float16, torch.bfloat16: torch.bfloat16, "auto": torch.float32}
    for given, expected in names.items():
        assert load(directory, dtype=given).engine.model.dtype == expected


@pytest.mark.parametrize("kv_cache_dtype", ["fp32", "bf16", "int8", "fp8"])
def test_chunks_do_not_change_a_bit(kv_cache_dtype: str, tmp_path: Path) -> None:
    llm = load(save_model(tmp_path, random_model("mistral", sliding_window=7)), kv_cache_dtype=kv_cache_dtype)
    whole = logits_of(llm, PROMPT)
    for chunks in ([1] * len(PROMPT), [5, 1, 15], [8, 13]):
        assert torch.equal(logits_of(llm, PROMPT, chunks), whole)
