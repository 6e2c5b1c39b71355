"""Damaged files and wrong arguments: one clear error that names what is wrong, and an engine that goes on."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, random_model, save_gguf, save_model

from teco_kernels import LLM, SamplingParams
from teco_kernels.decoder import RequestError
from teco_kernels.decoder.gguf import GGUFSource

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", random_model())


def refused(path: Path, message: str, **options: Any) -> None:
    """Loading fails with one ValueError whose message begins with the path of the culprit."""
    with pytest.raises(ValueError, match=f"^{re.escape(str(path.parent))}.*{message}"):
        LLM(path, **{"max_model_len": 64, "kv_cache_memory": 1 << 20, **options})


def change_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# ---- files that are missing or cut


def test_no_such_path(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "expected a Hugging Face directory or a .gguf file, found neither")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json: file is missing")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_file(name: str, directory: Path) -> None:
    (directory / name).unlink()
    refused(directory, f"{name}: file is missing")


def test_only_pickled_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, r"expected \*.safetensors files, found none \(pickled weights are never read\)")


@pytest.mark.parametrize("kept", [0, 4, 100, 3000, -1])
def test_truncated_safetensors(kept: int, directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(directory, "model.safetensors: truncated or damaged safetensors file")


def test_shards_that_are_missing_or_not_listed(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", random_model(), max_shard_size="100KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    refused(directory, f"{shard.name}: file is missing")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    refused(directory, "index.json: expected an object 'weight_map' of file names")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1', "expected JSON"),
        ("[1]", "expected a JSON object, got list"),
        pytest.param("[" * 100_000, "expected JSON: maximum recursion depth exceeded", id="nested"),
    ],
)
def test_broken_json(name: str, text: str, message: str, directory: Path) -> None:
    (directory / name).write_text(text)
    refused(directory, f"{name}: {message}")


def test_a_directory_in_place_of_a_file(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    refused(directory, "config.json: cannot be read: Is a directory")


def test_broken_chat_templates(directory: Path) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    for template in (5, {"default": "a"}, [5], [{"name": "default", "template": 5}]):
        (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        refused(directory, "tokenizer_config.json: expected a text 'chat_template', got")
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    refused(directory, "chat_template.jinja: cannot be read: 'utf-8' codec")


def test_broken_tokenizer(directory: Path) -> None:
    file = directory / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    refused(directory, "tokenizer.json: truncated or damaged")


# ---- configurations and tensors that contradict each other


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gemma3", "unknown architecture 'gemma3'; supported are llama, mistral, qwen2, qwen3"),
        ("model_type", None, "unknown architecture None"),
        ("model_type", ["llama"], r"unknown architecture \['llama'\]"),
        ("hidden_size", 2**70, "expected 'hidden_size' to be at most 2147483647, got 1180591620717411303424"),
        ("num_hidden_layers", 10**12, "expected 'num_hidden_layers' to be at most 10000, got 1000000000000"),
        ("hidden_size", None, "expected a positive integer 'hidden_size', got None"),
        ("hidden_size", "64", "expected a positive integer 'hidden_size', got '64'"),
        ("num_hidden_layers", 0, "expected a positive integer 'num_hidden_layers', got 0"),
        ("num_attention_heads", True, "expected a positive integer 'num_attention_heads', got True"),
        ("vocab_size", 1.5, "expected a positive integer 'vocab_size', got 1.5"),
        ("num_key_value_heads", 3, "expected 'num_attention_heads' to be a multiple of 'num_key_value_heads'"),
        ("hidden_act", "gelu", "expected 'hidden_act' silu, got 'gelu'"),
        ("rms_norm_eps", "small", "expected a number 'rms_norm_eps' from 0 to 1, got 'small'"),
        ("rms_norm_eps", float("nan"), "expected a number 'rms_norm_eps' from 0 to 1, got nan"),
        ("head_dim", 2**30, "expected 'head_dim' to be at most 65536, got 1073741824"),
        ("head_dim", 15, "rotary embedding: rotary_dim: expected an even number"),
        ("eos_token_id", "end", r"expected integers 'eos_token_id', got \['end'\]"),
        ("quantization_config", 4, "expected an object 'quantization_config', got 4"),
        ("rope_parameters", {"rope_type": "longrope"}, "unknown rope scaling 'longrope'"),
        (
            "rope_parameters",
            {"rope_type": "linear"},
            "rotary embedding: scaling: expected a positive number under 'factor'",
        ),
        ("rope_parameters", [1], r"expected an object 'rope_scaling', got \[1\]"),
        ("rope_parameters", {"rope_theta": "big"}, "expected a positive number 'rope_theta', got 'big'"),
        ("rope_parameters", {"rope_theta": 10**400}, "expected a positive number 'rope_theta', got 1000"),
        ("rope_parameters", {"rope_type": "linear", "factor": 10**400}, "rotary embedding: int too large"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2, "rope_theta": 1}, "rotary embedding: float division"),
        (
            "rope_parameters",
            {"rope_type": "linear", "factor": 1e-320},
            "rotary embedding: no finite frequencies come of",
        ),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "expected 'partial_rotary_factor' 1, got 0.5"),
    ],
)
def test_configuration(key: str, value: Any, message: str, directory: Path) -> None:
    change_config(directory, lambda config: config.update({key: value}))
    refused(directory, f"config.json: {message}")


def test_configuration_without_a_key(directory: Path) -> None:
    change_config(directory, lambda config: config.pop("intermediate_size"))
    refused(directory, "config.json: expected a positive integer 'intermediate_size', got None")


def test_layer_types_of_another_depth(tmp_path: Path) -> None:
    config = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    directory = save_model(tmp_path / "model", random_model("qwen2", **config))
    change_config(directory, lambda config: config["layer_types"].pop())
    refused(directory, "config.json: expected 3 'layer_types', one per layer; got 2")
    for kinds in (["chunked_attention"] * 3, 5):
        change_config(directory, lambda config, kinds=kinds: config.update({"layer_types": kinds}))
        refused(directory, "config.json: expected a list 'layer_types' of full_attention and sliding_attention, got")
    change_config(directory, lambda config: config.update({"layer_types": None, "max_window_layers": "all"}))
    refused(directory, "config.json: expected an integer 'max_window_layers', got 'all'")
    change_config(directory, lambda config: config.update({"max_window_layers": 1, "sliding_window": 2**70}))
    refused(directory, "config.json: expected a positive integer 'sliding_window' below 2[*][*]31, got 118")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "intermediate_size",
            128,
            r"'model.layers.0.mlp.gate_proj.weight' has shape \[96, 64\], .* asks for \[128, 64\]",
        ),
        ("vocab_size", 400, r"tensor 'model.embed_tokens.weight' has shape \[320, 64\], .* asks for \[400, 64\]"),
        ("num_hidden_layers", 4, "tensor 'model.layers.3.input_layernorm.weight' is missing"),
        ("num_hidden_layers", 2, "tensor 'model.layers.2.input_layernorm.weight': the configuration has 2 layers only"),
        ("num_key_value_heads", 4, r"'model.layers.0.self_attn.k_proj.weight' has shape \[32, 64\]"),
        ("attention_bias", True, "tensor 'model.layers.0.self_attn.q_proj.bias' is missing"),
    ],
)
def test_tensors_that_contradict_the_configuration(key: str, value: Any, message: str, directory: Path) -> None:
    change_config(directory, lambda config: config.update({key: value}))
    refused(directory, message)


def test_missing_tensor_and_wrong_dtype(directory: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    change_tensors(directory, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refused(directory, f"tensor '{name}': expected a floating dtype of 16 to 64 bits, got float8_e4m3fn")
    change_tensors(directory, lambda tensors: tensors.pop(name))
    refused(directory, f"tensor '{name}' is missing")


# ---- GGUF


def test_truncated_gguf(tmp_path: Path) -> None:
    """Cut anywhere: in the header, the metadata, the list of tensors, or the data."""
    file = save_gguf(tmp_path / "model.gguf", random_model(), "Q8_0")
    data, cut = file.read_bytes(), tmp_path / "cut.gguf"
    start_of_data = gguf.GGUFReader(file).data_offset
    for size in (0, 3, 4, 12, 23, 24, 100, 2000, start_of_data // 2, start_of_data - 40):
        cut.write_bytes(data[:size])
        refused(cut, "cut.gguf: (not a GGUF file|truncated or damaged GGUF file)")
    for size in (start_of_data + 10, len(data) // 2, len(data) - 32):
        cut.write_bytes(data[:size])
        refused(
            cut, "cut.gguf: truncated GGUF file: it ends before the end of tensor 'blk|cut.gguf: truncated GGUF file"
        )


def damaged(file: Path, position: int, layout: str, value: int) -> Path:
    data = bytearray(file.read_bytes())
    struct.pack_into(layout, data, position, value)
    target = file.with_name("damaged.gguf")
    target.write_bytes(data)
    return target


def test_damaged_gguf(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "model.gguf", random_model())
    refused(damaged(file, 0, "<I", 1), "not a GGUF file")
    refused(damaged(file, 4, "<I", 1), "expected GGUF version 2 or 3, little-endian; got 1")
    for position in (8, 16, 24):  # numbers of tensors and of values, length of the first key
        refused(damaged(file, position, "<Q", 2**62), "truncated or damaged GGUF file")
    tokens = file.read_bytes().index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    refused(damaged(file, tokens + 8, "<Q", 2**62), "truncated or damaged GGUF file")
    refused(damaged(file, tokens + 4, "<I", 9), "truncated or damaged GGUF file")
    refused(damaged(file, tokens, "<I", 77), "truncated or damaged GGUF file")
    dimensions = file.read_bytes().index(b"token_embd.weight") + len("token_embd.weight")
    for number in (0, 5, 2**31):
        refused(damaged(file, dimensions, "<I", number), "truncated or damaged GGUF file")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.tokens", 3, "expected a positive integer 'vocab_size', got None"),
        ("tokenizer.ggml.token_type", 3, "damaged tokenizer: expected lists of tokens and of their types"),
        ("tokenizer.ggml.merges", [3], "damaged tokenizer: "),
        ("tokenizer.ggml.pre", ["gpt-2"], r"expected a gpt2 tokenizer .* got 'gpt2' with \['gpt-2'\]"),
        ("tokenizer.ggml.eos_token_id", -1, "damaged tokenizer: eos token -1 of 320"),
        ("tokenizer.ggml.eot_token_id", "end", "damaged tokenizer: eot token 'end' of 320"),
        ("tokenizer.chat_template", 3, "expected a text 'tokenizer.chat_template', got 3"),
    ],
)
def test_gguf_metadata_of_other_types(
    key: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_gguf(tmp_path / "model.gguf", random_model())
    read_all = GGUFSource._hugging_face_config

    def changed(source: GGUFSource, path: Path) -> dict[str, Any]:
        source._metadata[key] = value
        return read_all(source, path)

    monkeypatch.setattr(GGUFSource, "_hugging_face_config", changed)
    refused(file, f"model.gguf: {message}")


def write_gguf(path: Path, architecture: str, tensors: dict[str, np.ndarray], **values: int) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_other_gguf_files(tmp_path: Path) -> None:
    refused(
        write_gguf(tmp_path / "a.gguf", "mamba", {}), "unknown architecture 'mamba'; supported are llama, qwen2, qwen3"
    )
    experts = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)}
    refused(write_gguf(tmp_path / "b.gguf", "llama", experts), "unknown tensor 'blk.0.ffn_gate_exps.weight'")
    refused(write_gguf(tmp_path / "c.gguf", "llama", {}), "expected a positive integer 'hidden_size', got None")
    refused(
        write_gguf(tmp_path / "d.gguf", "llama", {}, general__alignment=0),
        "expected a positive integer 'general.alignment', got 0",
    )
    file = save_gguf(tmp_path / "e.gguf", random_model())
    name = b"tokenizer.ggml.model"
    at = file.read_bytes().index(name) + len(name) + 12
    refused(damaged(file, at, "<I", int.from_bytes(b"bert", "little")), "expected a gpt2 tokenizer .* got 'bert'")


# ---- arguments


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dtype", "float8", "dtype: expected one of auto, float32, .*, bfloat16; got 'float8'"),
        ("dtype", torch.int8, "dtype: expected one of auto, float32, .*, bfloat16; got 'int8'"),
        ("kv_cache_dtype", "int4", "kv_cache_dtype: expected one of auto, fp32, .*; got 'int4'"),
        ("kv_cache_dtype", "fp8_e5m2", "kv_cache_dtype: expected one of auto, fp32, .*; got 'fp8_e5m2'"),
        ("quantization", "gptq", "quantization: expected one of keep, dequantize; got 'gptq'"),
        ("gptq_activation", "fp4", "gptq_activation: expected one of exact, int8; got 'fp4'"),
        ("tensor_parallel_size", 3, "tensor_parallel_size: expected 1 to 2, the model.s KV heads, got 3"),
        ("max_model_len", 513, "max_model_len: expected 1 to 512, the model's context; got 513"),
        ("max_model_len", 0, "max_model_len: expected a positive integer, got 0"),
        ("max_num_seqs", 0, "max_num_seqs: expected a positive integer, got 0"),
        ("max_num_batched_tokens", -1, "max_num_batched_tokens: expected a positive integer, got -1"),
        ("block_size", 2.0, "block_size: expected a positive integer, got 2.0"),
        ("kv_cache_memory", "1G", "kv_cache_memory: expected a positive integer, got '1G'"),
        ("kv_cache_memory", 100, "kv_cache_memory: expected at least 12288 bytes, one block; got 100"),
        ("num_threads", 0, "num_threads: expected a positive integer, got 0"),
    ],
)
def test_options(option: str, value: Any, message: str, directory: Path) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        LLM(directory, **{option: value})


@pytest.fixture
def llm(directory: Path) -> LLM:
    return LLM(directory, max_model_len=32, block_size=4, kv_cache_memory=6 * 3072, max_num_seqs=4)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([[]], {}, ValueError, "prompt: expected at least one token, got none"),
        ("", {}, ValueError, "prompt: expected at least one token, got none"),
        ([VOCAB_SIZE], {}, ValueError, f"prompt: expected token ids from 0 to 319, got {VOCAB_SIZE}"),
        ([1, -1], {}, ValueError, "prompt: expected token ids from 0 to 319, got -1"),
        ([[1.5]], {}, TypeError, r"prompt: expected a list of token ids, got \[1.5\]"),
        ([None], {}, TypeError, "prompt: expected a list of token ids, got None"),
        ("a\ud800", {}, ValueError, "text: expected valid Unicode"),
        ([1] * 32, {}, ValueError, "prompt: expected fewer tokens than max_model_len, 32; got 32"),
        ([1] * 25, {}, ValueError, "prompt: 25 tokens and an answer of up to 7 need more than the KV cache's 6 blocks"),
        ([1], {"n": 5}, ValueError, "n: expected at most max_num_seqs, 4; got 5"),
        ([1], {"logprobs": 321}, ValueError, "logprobs: expected at most 320, the vocabulary; got 321"),
        ([1], {"logit_bias": {320: 1.0}}, ValueError, "logit_bias: expected token ids from 0 to 319, got 320"),
        ([1], {"stop_token_ids": [-1]}, ValueError, "stop_token_ids: expected token ids from 0 to 319, got -1"),
    ],
)
def test_requests(prompt: Any, params: dict[str, Any], error: type[Exception], message: str, llm: LLM) -> None:
    with pytest.raises(error, match=f"^prompts\\[0\\]: {message}"):
        llm.generate(prompt, SamplingParams(**params), use_tqdm=False)
    assert llm.generate([1, 2], use_tqdm=False)[0].finished


def test_one_bad_prompt_stops_the_call_before_anything_is_computed(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"^prompts\[2\]: prompt: expected token ids from 0 to 319, got 999"):
        llm.generate([[1], [2], [999], [3]], use_tqdm=False)
    assert not llm.engine.has_unfinished_requests
    assert llm.metrics()["steps"] == 0


def test_wrong_types_of_arguments(llm: LLM) -> None:
    with pytest.raises(TypeError, match=r"^prompts: expected text, a list of token ids, or a list of these; got 5"):
        llm.generate(5, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^prompts: expected text, a list of token ids, or a list of these; got b'ab'"):
        llm.generate(b"ab", use_tqdm=False)
    with pytest.raises(
        TypeError, match=r"^prompts\[0\]: prompt: expected 'prompt' or 'prompt_token_ids' in it, got {}"
    ):
        llm.generate({}, use_tqdm=False)
    with pytest.raises(TypeError, match=r"^sampling_params: expected SamplingParams, or a list of them; got {'n': 1}"):
        llm.generate("a", {"n": 1}, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^sampling_params: expected one per prompt, 1; got 2"):
        llm.generate("a", [SamplingParams()] * 2, use_tqdm=False)
    llm.engine.add_request("x", [1], SamplingParams())
    with pytest.raises(ValueError, match=r"^request_id: 'x' is already in use"):
        llm.engine.add_request("x", [1], SamplingParams())
    llm.engine.abort_request("x")
    with pytest.raises(ValueError, match=r"^window: expected 2 to 32, got 1"):
        llm.score("abc", window=1)
    with pytest.raises(ValueError, match=r"^token_ids: expected token ids from 0 to 319, got 320"):
        llm.score([320, 1])
    with pytest.raises(TypeError, match=r"^token_ids: expected a list of token ids"):
        llm.score(["a", "b"])  # type: ignore[list-item]
    assert llm.generate(np.array([1, 2]).tolist(), use_tqdm=False)[0].finished


# ---- logits that are not numbers


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_token_fails_alone(poison: float, directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][7] = poison

    change_tensors(directory, change)
    llm = LLM(directory, max_model_len=64, block_size=4, kv_cache_memory=1 << 20)
    params = [SamplingParams(temperature=0, logit_bias={7: -1e9}), SamplingParams(n=2, seed=1, logit_bias={7: -1e9})]
    alone = [llm.generate([1, 2, 3], each, use_tqdm=False)[0].outputs for each in params]
    prompts = [[1, 2, 3], [5, 7, 5], [1, 2, 3]]
    with pytest.raises(RequestError, match=r"^request '\d+': expected finite logits, got NaN") as caught:
        llm.generate(prompts, [params[0], params[1], params[1]], use_tqdm=False)
    fine, failed, also_fine = caught.value.outputs
    assert [answer.token_ids for answer in fine.outputs] == [answer.token_ids for answer in alone[0]]
    assert [answer.token_ids for answer in also_fine.outputs] == [answer.token_ids for answer in alone[1]]
    assert [answer.finish_reason for answer in failed.outputs] == ["error", "error"]
    assert llm.metrics()["kv_blocks_used"] == 0
    with pytest.raises(RequestError, match="expected finite logits"):
        list(llm.stream([7, 7]))
    with pytest.raises(ValueError, match="token_ids: expected finite logits"):
        llm.score([1, 7, 2])
    assert [answer.token_ids for answer in llm.generate([1, 2, 3], params[0], use_tqdm=False)[0].outputs] == [
        answer.token_ids for answer in alone[0]
    ]


def test_nothing_left_to_draw_is_an_error_too(llm: LLM) -> None:
    forbidden = SamplingParams(logit_bias=dict.fromkeys(range(VOCAB_SIZE), -1e39), temperature=0)
    with pytest.raises(RequestError, match="expected finite logits, got NaN, infinity or nothing that may be drawn"):
        llm.generate([1], forbidden, use_tqdm=False)
    assert llm.generate([1], use_tqdm=False)[0].finished
