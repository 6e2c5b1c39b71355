"""The loop on the real default model: its GGUF file against transformers, and its 4-bit version."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from teco_kernels import LLM, SamplingParams
from teco_kernels.assets import held_out_text
from teco_kernels.decoder.loader import load_source

pytestmark = pytest.mark.model

BERLIN = "The capital of France is Paris, and the capital of Germany is"
PROMPTS = [
    BERLIN,
    "def fibonacci(n):",
    "Once upon a time",
    "The three primary colours are",
    "Water boils at a temperature of",
    "A haiku about the sea:\n",
]


@pytest.fixture(scope="module")
def llm(default_gguf: Path) -> LLM:
    """Its 4-bit matrices as they are: "exact" multiplies by the very weights that the reference has."""
    return LLM(default_gguf, max_model_len=512, kv_cache_memory=1 << 28, gptq_activation="exact")


@pytest.fixture(scope="module")
def reference(default_gguf: Path) -> Any:
    """transformers' model with the dequantised weights, fp32."""
    source = load_source(default_gguf)
    config = transformers.LlamaConfig(**{k: v for k, v in source.raw_config.items() if k != "model_type"})
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    weights = {name: source.tensor(name).float() for name in source.names()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def logits(reference: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(torch.tensor([token_ids])).logits[0]


def test_greedy_tokens_are_transformers(llm: LLM, reference: Any) -> None:
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    for output in outputs:
        prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
        assert answer == logits(reference, prompt + answer)[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert outputs[0].outputs[0].text.startswith(" Berlin")


def test_score_is_transformers(llm: LLM, reference: Any) -> None:
    token_ids = llm.tokenizer.encode(" ".join(PROMPTS) * 4)
    expected = logits(reference, token_ids)[:-1].log_softmax(-1)
    expected = expected.gather(-1, torch.tensor(token_ids[1:]).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(torch.tensor(llm.score(token_ids)), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_4_bit_model_knows_berlin(kv_cache_dtype: str, model_4bit: Path) -> None:
    """And says the same alone and in company, from a cache too small for all of them."""
    small = LLM(model_4bit, max_model_len=256, kv_cache_memory=8 << 20, kv_cache_dtype=kv_cache_dtype, block_size=8)
    params = SamplingParams(temperature=0, max_tokens=24)
    together = small.generate(PROMPTS * 3, params, use_tqdm=False)
    assert together[0].outputs[0].text.startswith(" Berlin")
    assert small.metrics()["kv_blocks_used"] == 0
    for number, prompt in enumerate(PROMPTS):
        (alone,) = small.generate(prompt, params, use_tqdm=False)
        for copy in together[number :: len(PROMPTS)]:
            assert copy.outputs[0].token_ids == alone.outputs[0].token_ids


def test_4_bit_model_loses_little(model_4bit: Path, default_gguf: Path) -> None:
    """On text it was not calibrated on: the figures of the README."""
    perplexity = {}
    for path in (default_gguf, model_4bit):
        activation = "exact" if path == default_gguf else "int8"
        llm = LLM(path, max_model_len=1024, kv_cache_memory=1 << 28, gptq_activation=activation)
        token_ids = llm.tokenizer.encode(held_out_text())
        scores = [score for start in range(0, 8192, 1024) for score in llm.score(token_ids[start : start + 1024])]
        perplexity[path] = math.exp(-sum(scores) / len(scores))
    assert perplexity[default_gguf] == pytest.approx(14.31, abs=0.01)
    assert perplexity[model_4bit] < 1.06 * perplexity[default_gguf]


def test_4_bit_model_chats(model_4bit: Path) -> None:
    llm = LLM(model_4bit, max_model_len=256, kv_cache_memory=1 << 28)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"


def test_ranks_say_the_same(model_4bit: Path) -> None:
    """Three groups of heads on two ranks and on three. Exact: rounded activations make much of a sum's last bit."""
    params = SamplingParams(temperature=0, max_tokens=32)
    answers = []
    for world_size in (1, 2, 3):
        options: dict[str, Any] = {"tensor_parallel_size": world_size, "num_threads": 1, "gptq_activation": "exact"}
        with LLM(model_4bit, max_model_len=256, kv_cache_memory=64 << 20, **options) as llm:
            answers.append([o.outputs[0].token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False)])
    assert answers[0] == answers[1] == answers[2]
