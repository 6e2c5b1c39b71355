"""A recycle head in the decoder loop: it says what it says in torch, and changes how fast answers come only."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import answers, each_alone, load, random_requests, together
from tiny_models import VOCAB_SIZE, logits_of, random_model, save_model
from torch.nn import functional as F

from teco_kernels import LLM, SamplingParams
from teco_kernels.decoder import recycle_head
from teco_kernels.decoder.loader import load_source
from teco_kernels.decoder.recycler import Guess, Recycler
from teco_kernels.decoder.scheduler import Sequence
from teco_kernels.training.head import Base, RecycleHead, load_head
from teco_kernels.training.recording import Recording
from teco_kernels.training.save import quantise_head, save_recycle_head
from teco_kernels.training.trainer import TrainingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "4 bits": {"bits": 4},
    "two narrow layers": {"num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "draft_vocab_size": 0},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), random_model())


@pytest.fixture(scope="module")
def base(path: Path) -> Base:
    return Base(load_source(path))


def random_head(folder: Path, base: Base, *, bits: int | None = None, **settings: Any) -> Path:
    """A head that has learned nothing; its vocabulary, if it has one of its own, is every second token."""
    config = TrainingSettings(**{"draft_vocab_size": VOCAB_SIZE // 2} | settings).head_config(base.config)
    if config.draft_vocab_size == VOCAB_SIZE:
        config = replace(config, draft_vocab_size=None)
    torch.manual_seed(1)
    head = RecycleHead(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    vocabulary = torch.arange(0, VOCAB_SIZE, 1 if config.draft_vocab_size is None else 2)
    texts = Recording(
        token_ids=torch.arange(64, dtype=torch.int32),
        greedy_ids=torch.arange(64, dtype=torch.int32),
        hidden=torch.randn(64, base.config.hidden_size).half(),
        lengths=torch.tensor([64], dtype=torch.int32),
        num_prompt=torch.tensor([1], dtype=torch.int32),
    )
    _, tensors, quantization = quantise_head(head, base, [texts], bits=bits)
    save_recycle_head(folder, config, tensors, vocabulary, base, report={}, quantization=quantization)
    return folder


@pytest.fixture(scope="module")
def head(path: Path, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_head(tmp_path_factory.mktemp("heads") / "head", base)


class Attentive(Recycler):
    """Always runs the head, notes what it hears, and guesses it whatever that costs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(head=True, **options)
        self.heard: dict[tuple[int, ...], tuple[int, float]] = {}

    def listens(self, num_sequences: int) -> bool:
        return True

    def is_sure(self, sequence: Sequence) -> bool:
        return False

    def _may_pay(self, num_sequences: int) -> bool:
        return True

    def _how_many(self, probabilities: list[float], num_sequences: int) -> int:
        return len(probabilities)

    def hear(self, sequence: Sequence, token_id: int, probability: float) -> None:
        super().hear(sequence, token_id, probability)
        self.heard[tuple(sequence.token_ids)] = token_id, probability


def with_head(path: Path, head: Path, num_blocks: int = 512, block_size: int = 16, **options: Any) -> LLM:
    """As `load`, with a cache of so many blocks for the head's layers too."""
    config = json.loads((head / "config.json").read_text())
    heads = 3 * 2 + config["num_layers"] * config["num_kv_heads"]  # of keys, and as many of values
    head_bytes = 16 + 4 if options.get("kv_cache_dtype") == "int8" else 16 * 4
    memory = num_blocks * block_size * heads * 2 * head_bytes
    llm = LLM(path, recycle_head=head, block_size=block_size, max_model_len=512, kv_cache_memory=memory, **options)
    assert llm.metrics()["kv_blocks"] == num_blocks
    return llm


def attentive(path: Path, head: Path, **options: Any) -> tuple[LLM, Attentive]:
    llm, recycler = with_head(path, head, **options), Attentive()
    llm.engine.recycler = recycler
    return llm, recycler


def torch_logprobs(path: Path, head: Path, base: Base, token_ids: list[int]) -> torch.Tensor:
    """What the head says after each token of a text but the first, by torch: ``[T - 1, draft vocabulary]``."""
    hidden: list[torch.Tensor] = []
    llm = LLM(path, max_model_len=512, gptq_activation="exact")
    llm.engine.runner.observer = lambda _, states, __: hidden.append(states.clone())
    logits_of(llm, token_ids)
    module, vocabulary = load_head(head, base.config)
    with torch.no_grad():
        embedded = F.embedding(torch.tensor(token_ids[1:]), base.embedding)
        out = module(embedded, torch.cat(hidden)[: len(token_ids) - 1], [len(token_ids) - 1])
        return (out @ (base.rows if vocabulary is None else base.rows[vocabulary]).t()).log_softmax(-1)


@pytest.mark.parametrize("options", [{}, {"num_blocks": 12, "max_num_batched_tokens": 8, "block_size": 8}])
@pytest.mark.parametrize("kind", HEADS)
def test_says_what_it_says_in_torch(kind: str, options: dict[str, Any], path: Path, base: Base, tmp_path: Path) -> None:
    """Behind prompts in chunks, in batches, with guesses rejected and sequences preempted."""
    head = random_head(tmp_path / "head", base, **HEADS[kind])
    llm, recycler = attentive(path, head, gptq_activation="exact", **options)
    draw = random.Random(0)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(size)] for size in (3, 20, 41)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert not options or llm.metrics()["preemptions"]
    assert llm.metrics()["accepted_tokens"] < llm.metrics()["guessed_tokens"]
    vocabulary = list(range(0, VOCAB_SIZE, 1 if HEADS[kind].get("draft_vocab_size") == 0 else 2))
    checked = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        text = prompt + output.outputs[0].token_ids
        expected = torch_logprobs(path, head, base, text)
        for end in range(len(prompt) + 1, len(text)):
            if tuple(text[:end]) in recycler.heard:  # not behind a token that came as a guess
                token_id, probability = recycler.heard[tuple(text[:end])]
                logprobs = expected[end - 2]
                assert abs(logprobs[vocabulary.index(token_id)] - math.log(probability)) < 1e-3
                assert logprobs.max() - math.log(probability) < 1e-3
                checked += 1
    assert checked > 45


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_dtype": "int8"},
        {"num_blocks": 30, "max_num_seqs": 6, "max_num_batched_tokens": 32, "block_size": 8},
    ],
)
def test_changes_no_answer(options: dict[str, Any], path: Path, head: Path) -> None:
    requests = random_requests(40, longest=60)
    alone = each_alone(load(path, **{key: options[key] for key in options if key == "kv_cache_dtype"}), requests)
    llm, _ = attentive(path, head, **options)
    assert together(llm, requests) == alone
    metrics = llm.metrics()
    assert metrics["guessed_tokens"] > 100
    assert metrics["kv_blocks_used"] == 0
    if "num_blocks" in options:
        assert metrics["preemptions"] > 0


def test_as_the_loop_uses_it(path: Path, head: Path) -> None:
    requests = random_requests(20, longest=60, seed=1)
    assert together(with_head(path, head), requests) == each_alone(load(path), requests)


def test_unverified_words_count(path: Path, head: Path) -> None:
    """Strict alternation: the model's token, the head's, and so on; the model goes on from both."""
    llm = with_head(path, head, recycle_verify=False)
    prompt = [5, 6, 7, 8]
    params = SamplingParams(temperature=0, max_tokens=21, ignore_eos=True)
    output = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    assert llm.metrics()["steps"] == 1 + 10  # the prompt's step gives one token, every other one two
    shorter = llm.generate(prompt, replace(params, max_tokens=20), use_tqdm=False)[0].outputs[0]
    assert shorter.token_ids == output.token_ids[:20]
    text = prompt + output.token_ids
    own = logits_of(load(path), text).argmax(-1).tolist()
    _, vocabulary = load_head(head, load_source(path).config)
    assert vocabulary is not None
    of_model = text[len(prompt) :: 2]
    assert of_model == own[len(prompt) - 1 : -1 : 2]
    said = torch_logprobs(path, head, Base(load_source(path)), text).argmax(-1)
    assert text[len(prompt) + 1 :: 2] == vocabulary[said[len(prompt) - 1 :: 2]].tolist()[: len(of_model) - 1]


def test_unverified_words_do_not_override_parameters(path: Path, head: Path) -> None:
    llm = with_head(path, head, recycle_verify=False)
    for params in (
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logit_bias=dict.fromkeys(range(300), -100.0)),
        SamplingParams(temperature=0, max_tokens=12, min_tokens=12, repetition_penalty=1.3),
    ):
        expected = answers(load(path).generate([5, 6, 7], params, use_tqdm=False))
        assert answers(llm.generate([5, 6, 7], params, use_tqdm=False)) == expected


class Oracle(Attentive):
    """Guesses some tokens of a text rightly, and others wrongly."""

    def __init__(self, text: list[int]) -> None:
        super().__init__()
        self._text, self._random = text, random.Random(0)

    def propose(self, sequences: Any) -> list[Guess]:
        guesses = []
        for sequence in sequences:
            start, count = len(sequence.token_ids), self._random.randrange(5)
            right = self._random.randrange(count + 1)
            found = self._text[start : min(start + count, len(self._text) - 1)]
            guesses.append(Guess([token + (place >= right) for place, token in enumerate(found)], 0))
        return guesses


def test_hears_what_torch_says_behind_guesses_that_came_true(path: Path, base: Base, head: Path) -> None:
    prompt, params = [5, 6, 7, 8, 9], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    text = prompt + load(path, gptq_activation="exact").generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    llm = with_head(path, head, gptq_activation="exact")
    oracle = llm.engine.recycler = Oracle(text)
    assert prompt + llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids == text
    assert 10 < oracle.num_accepted < oracle.num_guessed
    expected = torch_logprobs(path, head, base, text)
    for said_of, (token_id, probability) in oracle.heard.items():
        logprobs = expected[len(said_of) - 2]
        assert abs(logprobs[token_id // 2] - math.log(probability)) < 1e-3
        assert logprobs.max() - math.log(probability) < 1e-3


def test_prompts_are_heard_while_the_head_is_paused(path: Path, base: Base, head: Path) -> None:
    """What they leave in the prefix index serves requests to come."""
    llm, recycler = attentive(path, head, gptq_activation="exact", block_size=4)
    recycler.listens = lambda num_sequences: False  # type: ignore[method-assign]
    prompt, params = list(range(40)), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    llm.generate(prompt, params, use_tqdm=False)
    assert not recycler.heard
    del recycler.listens
    text = prompt + llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    assert llm.metrics()["prefix_cache_hit_tokens"] >= 36
    expected = torch_logprobs(path, head, base, text)
    assert recycler.heard
    for said_of, (_, probability) in recycler.heard.items():
        assert expected[len(said_of) - 2].max() - math.log(probability) < 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_changes_no_answer_in_16_bits(dtype: str, path: Path, head: Path) -> None:
    requests = random_requests(12, longest=40, seed=2)
    llm = LLM(path, recycle_head=head, max_model_len=512, dtype=dtype, kv_cache_dtype="fp8")
    llm.engine.recycler = Attentive()
    plain = LLM(path, max_model_len=512, dtype=dtype, kv_cache_dtype="fp8")
    assert together(llm, requests) == each_alone(plain, requests)


def test_answers_that_share_a_prompt(path: Path, head: Path) -> None:
    params = SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=12, ignore_eos=True)
    prompt = list(range(31))
    llm, _ = attentive(path, head, block_size=4)
    expected = answers(load(path, block_size=4).generate(prompt, params, use_tqdm=False))
    assert answers(llm.generate(prompt, params, use_tqdm=False)) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_words_that_are_not_numbers_are_none(value: float, path: Path, head: Path) -> None:
    llm, _ = attentive(path, head)
    llm.engine.recycle_runner._module._norm.fill_(value)  # type: ignore[union-attr]
    prompt, params = [1, 2, 3], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert answers(llm.generate(prompt, params, use_tqdm=False)) == answers(
        load(path).generate(prompt, params, use_tqdm=False)
    )


def test_a_head_that_fails_is_left_out(
    path: Path, head: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm, _ = attentive(path, head)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(llm.engine.recycle_runner, "run", fail)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = llm.generate([1, 2, 3], params, use_tqdm=False)
    assert caplog.messages == ["the recycle head failed, and is not used any more"]
    assert answers(outputs) == answers(load(path).generate([1, 2, 3], params, use_tqdm=False))


def heard_by(recycler: Recycler, text: list[int], token_id: int, probability: float) -> Sequence:
    sequence = Sequence(text, 1, 1000, 0)
    recycler.hear(sequence, token_id, probability)
    return sequence


def test_the_head_speaks_where_lookup_is_silent_or_less_sure() -> None:
    recycler = Attentive()
    assert recycler.propose([heard_by(recycler, [1, 2, 3, 4], 9, 0.55)]) == [([9], 105)]
    # What it says is looked up in turn: 3, 4 was followed by 5, 6.
    assert recycler.propose([heard_by(recycler, [3, 4, 5, 6, 7, 3], 4, 0.55)]) == [([4, 5, 6, 7], 105)]
    repeating = [1, 2, 3, 1, 2]
    assert recycler.propose([heard_by(recycler, repeating, 3, 0.2)])[0] == ([3, 1, 2, 3], 12)
    assert recycler.propose([heard_by(recycler, repeating, 8, 0.2)])[0] == ([3, 1, 2, 3], 2)
    assert recycler.propose([heard_by(recycler, repeating, 8, 0.95)])[0].token_ids[0] == 8
    stale = heard_by(recycler, [1, 2, 3, 4], 9, 0.9)
    stale.token_ids.append(5)
    assert recycler.propose([stale]) == [([], 0)]


def gained(recycler: Recycler, share: float, steps: int, head_seconds: float) -> Iterator[bool]:
    """Whether the head is listened to, step by step, at one second a step; a share of its words comes true."""
    draw = random.Random(0)
    text = list(range(10))
    for _ in range(steps):
        sequence = Sequence(text, 1, 1000, 0)
        listens = recycler.listens(1)
        if listens:
            recycler.hear(sequence, 50, 0.55)
            recycler.head_cost.add(1, head_seconds)
        (guess,) = recycler.propose([sequence])
        if guess.token_ids:
            accepted = int(draw.random() < share)
            recycler.learn(sequence, guess, accepted, 1)
        seconds = 1.0 + 0.05 * len(guess.token_ids)
        recycler.cost.add(1 + len(guess.token_ids), seconds)
        recycler.end_step(1, 1, seconds)
        yield listens


def test_a_head_that_does_not_pay_is_paused() -> None:
    assert all(gained(Recycler(head=True), 0.6, 400, 0.1))
    useless = list(gained(Recycler(head=True), 0.02, 1000, 0.1))
    assert sum(useless) < 400
    assert any(useless[600:])  # tried again
    costly = list(gained(Recycler(head=True), 0.6, 1000, 0.9))
    assert sum(costly[:400]) > sum(costly[400:])  # for longer and longer
    never_right = list(gained(Recycler(head=True), 0.0, 4000, 0.06))  # what was believed of it fades out
    assert sum(never_right[1000:]) < 1500


def test_a_head_that_has_paid_again_is_paused_briefly() -> None:
    recycler = Recycler(head=True)
    for share, steps in ((0.02, 800), (0.9, 800)):
        list(gained(recycler, share, steps, 0.1))
    listened = list(gained(recycler, 0.02, 600, 0.1))
    pause = listened.index(False)
    assert listened.index(True, pause) - pause == 64


def test_the_head_of_a_model_is_found(path: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycle_head, "_SHIPPED", tmp_path)
    assert LLM(path, recycle_head="auto").engine.recycle_runner is None  # lookup alone
    found = random_head(tmp_path / "of this model", base)
    llm = LLM(path, recycle_head="auto")
    assert llm.engine.recycle_runner is not None
    config = found / "config.json"
    raw = json.loads(config.read_text())
    for change in ({"base_norm": "another"}, {"base_vocab_size": VOCAB_SIZE + 2}):  # as of a fine-tuned model
        config.write_text(json.dumps(raw | change))
        assert LLM(path, recycle_head="auto").engine.recycle_runner is None


def test_heads_of_other_models_are_refused(path: Path, head: Path, tmp_path: Path) -> None:
    narrow = save_model(tmp_path / "narrow", random_model(hidden_size=32, num_attention_heads=2))
    with pytest.raises(ValueError, match="this recycle head is for models of hidden size 64, the model has 32"):
        LLM(narrow, recycle_head=head)
    with pytest.raises(ValueError, match="recycle_head: expected 'lookup', 'auto' or a folder with a head, got 'none'"):
        LLM(path, recycle_head="none")
    with pytest.raises(ValueError, match="recycle_verify: False needs a recycle head, got recycle_head 'lookup'"):
        LLM(path, recycle_head="lookup", recycle_verify=False)
