"""Guessed tokens change how fast an answer comes, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine import END_ID, answers, each_alone, load, random_requests, together
from tiny_models import VOCAB_SIZE, random_model, save_model

from teco_kernels import LLM, SamplingParams
from teco_kernels.decoder.gate import Gate
from teco_kernels.decoder.lookup import MATCH_LENGTHS, ContextLookup
from teco_kernels.decoder.recycler import Guess, Recycler, StepCost
from teco_kernels.decoder.scheduler import Sequence as SequenceState

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), random_model())


class FixedGuesses(Recycler):
    """Guesses given by a function of a sequence's tokens, made whatever they cost."""

    def __init__(self, guess: Callable[[Sequence[int], int], list[int]], max_tokens: int = 4) -> None:
        super().__init__(max_tokens)
        self._function = guess

    def propose(self, sequences: Sequence[SequenceState]) -> list[Guess]:
        guesses = []
        for sequence in sequences:
            self._guess(sequence)
            room = sequence.max_tokens - sequence.num_generated - 1
            guesses.append(Guess(self._function(sequence.token_ids, min(self.max_tokens, max(room, 0))), 0))
        return guesses


def with_guesses(llm: LLM, recycler: Recycler) -> LLM:
    """`llm` must have been made with recycle_head="lookup", which leaves room for guesses in its plans."""
    llm.engine.recycler = recycler
    return llm


def search(token_ids: list[int], count: int) -> tuple[list[int], int]:
    """What `ContextLookup` finds, by looking at every place."""
    for length in MATCH_LENGTHS:
        for end in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[end - length : end] == token_ids[-length:]:
                text = list(token_ids)
                for place in range(end, end + count):
                    text.append(text[place])
                return text[len(token_ids) :], length
    return [], 0


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 5), st.randoms(use_true_random=False))
def test_lookup_finds_the_latest_longest_match(tokens: list[int], count: int, draw: random.Random) -> None:
    lookup = ContextLookup()
    size = 0
    while size < len(tokens):
        size = min(len(tokens), size + draw.randrange(1, 9))
        assert lookup.propose(tokens[:size], count) == search(tokens[:size], count)


def test_cost_of_a_step() -> None:
    cost = StepCost()
    assert cost(1) == cost(9) == 1.0
    for seconds in (5.0, 3.0, 4.0):
        cost.add(2, seconds)
    assert cost(1) == cost(2) == cost(7) == 4.0, "what is not known is held to be cheap"
    cost.add(6, 8.0)
    assert [cost(size) for size in (2, 3, 6, 7)] == [4.0, 4.0, 8.0, 8.0]
    cost.add(40, 16.0)
    cost.add(80, 24.0)
    assert [cost(size) for size in (40, 60, 80, 100)] == [16.0, 20.0, 24.0, 28.0], "on a line where sizes are many"
    assert [cost.knows(size) for size in (6, 7, 60, 81)] == [True, False, True, False]
    for _ in range(600):
        cost.add(2, 1.0)
    assert cost(6) == 1.0, "a size not seen for long is tried again"


def test_cost_of_a_long_step() -> None:
    cost = StepCost()
    cost.add(32, 8.0)
    assert [cost(size) for size in (32, 40, 64)] == [8.0, 8.0, 16.0], "only the next larger ones are tried"


def made_guesses(seconds: Callable[[int], float], num_sequences: int, truth: float) -> int:
    """Guesses in the last of many steps of sequences that repeat themselves; a share of `truth` comes true."""
    recycler, draw = Recycler(), random.Random(0)
    sequences = [SequenceState([1, 2, 3] * 4, 1, 1000, 0) for _ in range(num_sequences)]
    count = 0
    for _ in range(200):
        guesses = recycler.propose(sequences)
        count = sum(len(guess.token_ids) for guess in guesses)
        for sequence, guess in zip(sequences, guesses, strict=True):
            accepted = 0
            while accepted < len(guess.token_ids) and draw.random() < truth:
                accepted += 1
            recycler.learn(sequence, guess, accepted, min(accepted + 1, len(guess.token_ids)))
        recycler.cost.add(num_sequences + count, seconds(num_sequences + count))
    return count


def open_share(gain: float, noise: float) -> float:
    """Of many steps, how many a gate lets have guesses, that give so many times the tokens of a step without."""
    gate, draw = Gate(), random.Random(0)
    opened = 0
    for _ in range(3000):
        opened += gate.is_open
        gate.add(8, 100, (1 / gain if gate.is_open else 1.0) * (1 + noise * draw.random()))
    return opened / 3000


def test_gate_opens_where_guesses_gain() -> None:
    assert open_share(1.2, 0.3) > 0.85
    assert open_share(0.9, 0.3) < 0.12
    assert open_share(1.0, 0.0) < 0.12, "trials alone"


def test_guesses_are_made_where_they_pay() -> None:
    def bound_by_memory(tokens: int) -> float:
        return 1.0 + 0.01 * tokens

    def bound_by_arithmetic(tokens: int) -> float:
        return float(tokens)

    assert made_guesses(bound_by_memory, 1, truth=0.9) == 4
    assert made_guesses(bound_by_memory, 1, truth=0.0) == 0
    assert made_guesses(bound_by_arithmetic, 1, truth=0.9) == 0
    assert made_guesses(bound_by_arithmetic, 8, truth=0.9) == 0
    # Free up to four tokens, and at the price of a plain one from there on.
    assert made_guesses(lambda tokens: max(4.0, 2.0 * tokens - 4), 2, truth=0.9) == 2


@pytest.mark.parametrize("kind", ["lookup", "wrong", "right", "half right"])
def test_guesses_change_no_answer(kind: str, path: Path) -> None:
    requests = random_requests(40, longest=60)
    plain = load(path)
    alone = each_alone(plain, requests)
    said = {}  # what follows each text that plain decoding has said
    for (prompt, _), outputs in zip(requests, alone, strict=True):
        for token_ids, *_ in outputs:
            text = [*prompt, *token_ids]
            said |= {tuple(text[:end]): text[end:] for end in range(len(prompt), len(text))}
    draw = random.Random(0)

    def guess(token_ids: Sequence[int], count: int) -> list[int]:
        right = said[tuple(token_ids)][:count]
        wrong = [draw.randrange(VOCAB_SIZE) for _ in range(count)]
        if kind == "half right":
            return [draw.choice(pair) for pair in zip(right, wrong, strict=False)]
        return right if kind == "right" else wrong

    for options in ({}, {"num_blocks": 24, "max_num_seqs": 6, "max_num_batched_tokens": 32, "block_size": 8}):
        llm = load(path, recycle_head="lookup", **options)
        if kind != "lookup":
            with_guesses(llm, FixedGuesses(guess))
        assert together(llm, requests) == alone
        metrics = llm.metrics()
        assert metrics["kv_blocks_used"] == 0
        if options:
            assert metrics["preemptions"] > 0
        if kind != "lookup":
            assert metrics["guessed_tokens"] > 100
            if kind == "right":
                # Of three answers that begin alike, one is guessed.
                assert metrics["accepted_tokens"] > 0.9 * metrics["guessed_tokens"]


def test_rejected_guesses_leave_no_trace(path: Path) -> None:
    prompt, params = list(range(1, 30)), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    plain = load(path, block_size=4)
    guessing = with_guesses(load(path, block_size=4, recycle_head="lookup"), FixedGuesses(lambda _, count: [0] * count))
    expected: list[Any] = []
    for llm in (plain, guessing):
        llm.engine.add_request("a", prompt, params)
        states = []
        while llm.engine.has_unfinished_requests:
            outputs = llm.engine.step()
            running = [(s.token_ids, s.num_computed, len(s.blocks)) for s in llm.engine.scheduler.running]
            states.append((answers(outputs), repr(running), llm.metrics()["kv_blocks_used"]))
        expected = expected or states
        assert states == expected
    # What the prefix index now holds is the text, and only that.
    text = prompt + guessing.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    again = SamplingParams(temperature=0, max_tokens=1)
    assert answers(guessing.generate(text, again, use_tqdm=False)) == answers(
        plain.generate(text, again, use_tqdm=False)
    )


def test_answers_that_share_a_prompt(path: Path) -> None:
    """The prompt's last token is a step of its own, after which its answers share blocks: no place for guesses."""
    options: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 30}
    for seed in range(4):
        prompt = random.Random(seed).sample(range(END_ID), 31)
        params = SamplingParams(n=4, temperature=1.5, seed=seed, max_tokens=12, ignore_eos=True, logprobs=0)
        plain = load(path, **options).generate(prompt, params, use_tqdm=False)
        said: dict[tuple[int, ...], list[int]] = {}
        for output in plain[0].outputs:
            text = prompt + output.token_ids
            said = {tuple(text[:end]): text[end:] for end in range(len(prompt), len(text))} | said
        right = FixedGuesses(lambda ids, count, said=said: said.get(tuple(ids), [1] * count)[:count])
        guessing = with_guesses(load(path, recycle_head="lookup", **options), right)
        assert answers(guessing.generate(prompt, params, use_tqdm=False)) == answers(plain)
        assert guessing.metrics()["accepted_tokens"] > 0


def test_right_guesses_save_steps(path: Path) -> None:
    prompt, params = [5, 6, 7], SamplingParams(temperature=0, max_tokens=41, ignore_eos=True)
    text = prompt + load(path).generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    llm = with_guesses(
        load(path, recycle_head="lookup"),
        FixedGuesses(lambda token_ids, count: text[len(token_ids) : len(token_ids) + count]),
    )
    assert prompt + llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids == text
    assert llm.metrics()["steps"] == 1 + 40 // 5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"recycle_head": "nowhere"}, "recycle_head"), ({"recycle_verify": False}, "recycle_verify")],
)
def test_refuses(options: dict[str, Any], message: str, path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(path, **options)
