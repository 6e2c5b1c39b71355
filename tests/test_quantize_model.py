"""Quantising whole models, through to the decoder's loader; interrupted runs and reports."""

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
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers

from teco_kernels import LLM
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.tokenizer import Tokenizer
from teco_kernels.decoder.weights import WeightLoader
from teco_kernels.ops import GPTQWeight
from teco_kernels.ops._reference import relative_error
from teco_kernels.quantization import (
    LayerReport,
    QuantizationSettings,
    model,
    quantize_model,
    round_to_nearest,
)
from teco_kernels.quantization.calibration import token_windows
from teco_kernels.quantization.perplexity import perplexity
from teco_kernels.quantization.report import REPORT_NAME, by_layer, draw
from teco_kernels.quantization.unfinished import Part, fingerprint, unfinished

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
from test_quantize_model import KILLED, tokens
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
