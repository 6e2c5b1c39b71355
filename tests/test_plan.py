"""Recorded plans: what they replay, what they refuse, and that a model's steps keep their bits."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import random_model, save_model

import teco_kernels as tk
from teco_kernels import LLM, SamplingParams
from teco_kernels.decoder.batch import Batch, Span
from teco_kernels.ops import Plan


def test_replay_reads_and_writes_what_was_recorded() -> None:
    x, weight, out, gated = torch.randn(4, 64), torch.randn(64), torch.empty(4, 64), torch.empty(4, 32)

    def calls() -> None:
        tk.rms_norm(x, weight, 1e-6, out=out)
        tk.silu_and_mul(out, out=gated)

    plan = Plan(calls, keep_alive=(x, weight, out, gated))
    assert torch.equal(gated, tk.silu_and_mul(tk.rms_norm(x, weight, 1e-6)))
    x.normal_()
    plan.replay()
    assert torch.equal(gated, tk.silu_and_mul(tk.rms_norm(x, weight, 1e-6)))


def test_a_failed_recording_ends() -> None:
    def fails() -> None:
        tk.silu_and_mul(torch.randn(2, 3))

    with pytest.raises(ValueError, match="even last dimension"):
        Plan(fails, keep_alive=None)
    Plan(lambda: tk.silu_and_mul(torch.randn(2, 4)), keep_alive=None)


def test_plans_do_not_nest() -> None:
    with pytest.raises(ValueError, match="recording one already"):
        Plan(lambda: Plan(lambda: None, keep_alive=None), keep_alive=None)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_a_replayed_step_has_the_bits_of_an_eager_one(family: str, tmp_path: Path) -> None:
    """Also with other blocks, positions and tokens than it was recorded with, and another number of threads."""
    config = {"sliding_window": 5} if family == "mistral" else {}
    llm = LLM(save_model(tmp_path, random_model(family, **config)), max_model_len=64, block_size=4)
    runner = llm.engine.runner
    cache = runner.cache
    prompts, blocks = [[5, 6, 7] * 4, [9] * 23], [[3, 1, 8, 2], [7, 0, 4, 6, 5, 9, 10]]
    threads = torch.get_num_threads()
    for prompt, table in zip(prompts, blocks, strict=True):
        runner.run([Span(prompt, 0, len(prompt), table)])
    try:
        for step in range(3):
            for prompt in prompts:
                prompt.append(11 * step + len(prompt))
            spans = [Span(prompt, len(prompt) - 1, 1, table) for prompt, table in zip(prompts, blocks, strict=True)]
            for batch in (spans, spans[::-1], spans[:1]):
                eager = runner.model.forward(Batch.from_spans(batch, cache.block_size), cache, runner.buffers)
                torch.set_num_threads(1 + step)
                assert torch.equal(runner.run(batch), eager)
    finally:
        torch.set_num_threads(threads)


def test_a_model_goes_with_its_last_reference(tmp_path: Path) -> None:
    """Gigabytes must not wait for the cycle collector: plans hold what they replay over, not who made them."""
    llm = LLM(save_model(tmp_path, random_model()), max_model_len=64, block_size=4)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3), use_tqdm=False)
    runner = weakref.ref(llm.engine.runner)
    gc.disable()
    try:
        del llm
        assert runner() is None
    finally:
        gc.enable()
