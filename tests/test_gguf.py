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

from teco_kernels import LLM
from teco_kernels.decoder.gguf import GGUFSource
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    "The capital of France is Paris.",
    "  two spaces,\n\nlines\tand tabs  ",
    "naïve café, Straße, 東京 🙂 e\u0301",
    "It's 2024, they'll pay 1,234.56",
    f"a special{END}token {ASSISTANT}",
]


def both(tmp_path: Path, model: Any, quantization: str, **metadata: Any) -> tuple[LLM, LLM]:
    """The model from a GGUF file and from a directory with the same numbers."""
    file = save_gguf(tmp_path / "model.gguf", model, quantization, **metadata)
    return load(file), load(save_model(tmp_path / "directory", model))


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_have_the_bits_of_the_directory(family: str, quantization: str, tmp_path: Path) -> None:
    head_dim = {"head_dim": 32} if family == "qwen3" else {}
    from_file, from_directory = both(tmp_path, random_model(family, **head_dim), quantization)
    assert torch.equal(logits_of(from_file, PROMPT), logits_of(from_directory, PROMPT))
    assert from_file.tokenizer.eos_token_ids == from_directory.tokenizer.eos_token_ids


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
