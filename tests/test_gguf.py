"""GGUF files give the model and the tokenizer of the Hugging Face directory they were made from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_decoder_families import LLAMA3, PROMPT, ROPE, load
from tiny_models import (
    ASSISTANT,
    CHAT_TEMPLATE,
    END,
    VOCAB_SIZE,
    logits_of,
    random_model,
    save_gguf,
    save_model,
    tiny_tokenizer,
)

from teco_kernels import LLM, GPTQWeight, SamplingParams, gptq_matmul
from teco_kernels.decoder.gguf import GGUFSource
from teco_kernels.decoder.gguf_blocks import read_blocks
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.tokenizer import Tokenizer
from teco_kernels.ops import DenseWeight

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    "The capital of France is Paris.",
    "  two spaces,\n\nlines\tand tabs  ",
    "naïve café, Straße, 東京 🙂 e\u0301",
    "It's 2024, they'll pay 1,234.56",
    f"a special{END}token {ASSISTANT}",
]


TAKEN_OVER = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def both(tmp_path: Path, model: Any, quantization: str, **metadata: Any) -> tuple[LLM, LLM]:
    """The model from a GGUF file and from a directory with the same numbers."""
    file = save_gguf(tmp_path / "model.gguf", model, quantization, **metadata)
    return load(file, gptq_activation="exact"), load(save_model(tmp_path / "directory", model))


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", *TAKEN_OVER])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_have_the_bits_of_the_directory(family: str, quantization: str, tmp_path: Path) -> None:
    """Whether the matrices are dequantised, or taken over and unpacked by the kernel."""
    head_dim = {"head_dim": 32} if family == "qwen3" else {}
    from_file, from_directory = both(tmp_path, random_model(family, **head_dim), quantization)
    expected = logits_of(from_directory, PROMPT)
    assert torch.equal(logits_of(from_file, PROMPT), expected)
    assert from_file.tokenizer.eos_token_ids == from_directory.tokenizer.eos_token_ids
    if quantization in TAKEN_OVER:
        dequantised = load(tmp_path / "model.gguf", quantization="dequantize")
        assert torch.equal(logits_of(dequantised, PROMPT), expected)
        assert from_file.metrics()["weight_bytes"] < dequantised.metrics()["weight_bytes"]
        params = SamplingParams(temperature=0, max_tokens=20)
        taken_over, dense = (llm.generate(PROMPT, params, use_tqdm=False)[0] for llm in (from_file, dequantised))
        assert taken_over.outputs[0].token_ids == dense.outputs[0].token_ids


@pytest.mark.parametrize("quantization", TAKEN_OVER)
def test_weights_are_those_that_the_gguf_package_dequantises(quantization: str) -> None:
    """Also of blocks that no quantizer makes: random codes under scales of either sign, a subnormal one and a zero."""
    kind = gguf.GGMLQuantizationType[quantization]
    generator = torch.Generator().manual_seed(1)
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = torch.randint(256, (40, 3, block_bytes), generator=generator, dtype=torch.uint8)
    floats = 1 + quantization.endswith("_1")
    blocks[..., : 2 * floats] = torch.randn(40, 3, floats, generator=generator).half().view(torch.uint8)
    blocks[0, 0, :2], blocks[1, 0, :2] = torch.tensor([[3, 0], [0, 0]], dtype=torch.uint8)
    rows = blocks.flatten(1)
    weight = GPTQWeight.from_codes(**read_blocks(rows, kind))
    expected = torch.from_numpy(gguf.quants.dequantize(rows.numpy(), kind)).t()
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(gptq_matmul(torch.eye(96), weight), expected)


def test_formats_that_are_not_taken_over_are_dequantised(tmp_path: Path) -> None:
    """As in files of mixed formats: here the down projections lie in F16 among 4-bit matrices."""
    file = save_gguf(tmp_path / "model.gguf", random_model(), "Q4_1", exceptions={"down_proj": "F16", "v_proj": "Q8_0"})
    mixed, dequantised = load(file, gptq_activation="exact"), load(file, quantization="dequantize")
    layer = mixed.engine.model.stack.layers[0]
    assert [type(weight) for weight in layer.down.weights] == [DenseWeight]
    assert [weight.bits for weight in layer.qkv.weights if isinstance(weight, GPTQWeight)] == [4, 8]
    assert torch.equal(logits_of(mixed, PROMPT), logits_of(dequantised, PROMPT))


@pytest.mark.parametrize("quantization", TAKEN_OVER)
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_taken_over_and_held_once(tied: bool, quantization: str, tmp_path: Path) -> None:
    """As in files whose matrices lie in 4 bits: a row is the same number, gathered from blocks or dequantised."""
    model = random_model(tie_word_embeddings=tied)
    file = save_gguf(tmp_path / "model.gguf", model, "Q4_1", exceptions={"embed_tokens": quantization})
    taken_over, dequantised = load(file, gptq_activation="exact"), load(file, quantization="dequantize")
    held = taken_over.engine.model
    assert isinstance(held.embedding, GPTQWeight)
    assert (held.lm_head.weights[0] is held.embedding) == tied
    assert isinstance(dequantised.engine.model.embedding, torch.Tensor)
    expected = logits_of(dequantised, PROMPT)
    assert torch.equal(logits_of(taken_over, PROMPT), expected)
    assert torch.equal(logits_of(taken_over, PROMPT, [1] * len(PROMPT)), expected)


def test_damaged_scales_are_named(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "model.gguf", random_model(), "Q4_1")
    source = GGUFSource(file)
    position = source._start + source._infos["model.layers.1.mlp.up_proj.weight"].offset
    data = bytearray(file.read_bytes())
    data[position : position + 2] = b"\xff\x7f"  # NaN
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.gguf: layer 'model.layers.1.mlp.up_proj': scales: expected finite"):
        load(file)


@pytest.mark.parametrize(
    ("config", "metadata"),
    [
        ({"tie_word_embeddings": True}, {}),
        ({"attention_bias": True}, {}),
        ({"num_key_value_heads": 4}, {}),
        (
            {"rope_parameters": ROPE | {"rope_type": "linear"}},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        ),
        (
            {"rope_parameters": ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 64}},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
            },
        ),
    ],
    ids=["tied", "biases", "all heads", "linear", "yarn"],
)
def test_variants_of_llama(config: dict[str, Any], metadata: dict[str, Any], tmp_path: Path) -> None:
    from_file, from_directory = both(tmp_path, random_model("llama", **config), "F32", **metadata)
    assert torch.equal(logits_of(from_file, PROMPT), logits_of(from_directory, PROMPT))


def test_mistral_is_a_llama_with_a_window(tmp_path: Path) -> None:
    model = random_model("mistral", sliding_window=6)
    from_file, from_directory = both(tmp_path, model, "F32", **{"attention.sliding_window": 6})
    assert from_file.config.sliding_windows == (6,) * 3
    assert torch.equal(logits_of(from_file, PROMPT), logits_of(from_directory, PROMPT))


def test_llama3_scaling_is_recognised_in_its_factors(tmp_path: Path) -> None:
    """Files store one divisor per frequency; the numbers of the formula are found again, or the file is refused."""
    scaling = LLAMA3 | {"rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192}
    model = random_model("llama", head_dim=64, rope_parameters=scaling | {"rope_type": "llama3"})
    file, frequencies = tmp_path / "model.gguf", 500000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    turns = frequencies * 8192 / (2 * math.pi)
    smooth = ((turns - 1) / 3).clamp(0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).float()

    save_gguf(file, model, rope_factors=factors)
    directory = load(save_model(tmp_path / "directory", model))
    assert load(file).config.rope_scaling == directory.config.rope_scaling
    assert torch.equal(logits_of(load(file), PROMPT), logits_of(directory, PROMPT))

    factors[3] *= 1.5
    save_gguf(file, model, rope_factors=factors)
    with pytest.raises(ValueError, match=r"model.gguf: tensor 'rope_freqs.weight' holds a rope scaling other than"):
        load(file)


def test_tokenizer_is_that_of_the_directory(tmp_path: Path) -> None:
    source = load_source(save_gguf(tmp_path / "model.gguf", random_model()))
    expected = Tokenizer(tiny_tokenizer())
    for text in TEXTS:
        assert source.tokenizer.encode(text) == expected.encode(text)
        assert source.tokenizer.decode(expected.encode(text), skip_special_tokens=False) == text
    assert source.tokenizer.chat_template == CHAT_TEMPLATE
    assert source.tokenizer.special_tokens == {"eos_token": END}


@pytest.mark.parametrize("split", ["default", "gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_every_pre_tokenizer_keeps_the_text(split: str, tmp_path: Path) -> None:
    metadata = dict(GGUFSource(save_gguf(tmp_path / "model.gguf", random_model()))._metadata)
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": split}, tmp_path)
    for text in TEXTS[:2] + TEXTS[3:]:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    digits = [tokenizer.decode([token]) for token in tokenizer.encode("202420")]
    assert len(digits) >= {"smollm": 6, "qwen2": 6, "llama-bpe": 2}.get(split, 1)


def test_beginning_of_sequence_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    metadata = dict(GGUFSource(save_gguf(tmp_path / "model.gguf", random_model()))._metadata)
    user = VOCAB_SIZE - 2
    metadata |= {"tokenizer.ggml.bos_token_id": user, "tokenizer.ggml.add_bos_token": True}
    with_bos = Tokenizer.from_gguf(metadata, tmp_path)
    assert with_bos.encode("abc")[0] == user
    assert user not in with_bos.encode("abc", add_special_tokens=False)
    llama3 = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.add_bos_token"}
    assert Tokenizer.from_gguf(llama3 | {"tokenizer.ggml.pre": "llama-bpe"}, tmp_path).encode("abc")[0] == user
    assert user not in Tokenizer.from_gguf(llama3, tmp_path).encode("abc")
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert user not in Tokenizer.from_gguf(metadata, tmp_path).encode("abc")


def test_reader_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "model.gguf", random_model(), "Q8_0")
    source, reader = GGUFSource(file), gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert source._metadata == fields
    assert len(source.names()) == len(reader.tensors)
