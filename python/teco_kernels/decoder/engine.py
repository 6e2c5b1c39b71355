"""The loop itself: schedule, run, sample, commit."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import isnan
from operator import index
from typing import Any, TypeVar

import torch

from teco_kernels.decoder.answer import Answer
from teco_kernels.decoder.batch import Span
from teco_kernels.decoder.kv_cache import KVCache
from teco_kernels.decoder.model import Transformer
from teco_kernels.decoder.recycle_module import RecycleModule
from teco_kernels.decoder.recycle_runner import RecycleRunner
from teco_kernels.decoder.recycler import NO_GUESS, Guess, Recycler
from teco_kernels.decoder.runner import Runner
from teco_kernels.decoder.sampler import INVALID_TOKEN, draws_ahead, sample_tokens, token_logprobs
from teco_kernels.decoder.sampling_params import RequestMetrics, RequestOutput, SamplingParams
from teco_kernels.decoder.scheduler import Scheduler, Sequence
from teco_kernels.decoder.step_messages import StepMessages
from teco_kernels.decoder.tokenizer import Tokenizer

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)

_SEED_STRIDE = 0x9E3779B97F4A7C15  # keeps the random numbers of a request's answers apart
_INVALID_LOGITS = "expected finite logits, got NaN, infinity or nothing that may be drawn"
_SCORE_ROWS = 128  # logits that `score` holds at a time


@dataclass(eq=False)
class Request:
    """A prompt and the answers to it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    answers: list[Answer]
    metrics: RequestMetrics

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self.answers)

    def take_output(self) -> RequestOutput:
        """The request as it is now; what follows counts as new."""
        outputs = []
        for answer in self.answers:
            output = _copied(answer.output)
            output.token_ids = list(output.token_ids)
            if output.logprobs is not None:
                output.logprobs = list(output.logprobs)
            outputs.append(output)
            answer.output.new_text = ""
        metrics = _copied(self.metrics)
        return RequestOutput(self.request_id, self.prompt, self.prompt_token_ids, outputs, self.finished, metrics)


def _copied(record: _T) -> _T:
    """A copy of a dataclass, shallow; `dataclasses.replace` takes several times as long, in each step."""
    copied = object.__new__(type(record))
    copied.__dict__.update(record.__dict__)
    return copied


@dataclass(eq=False)
class _Draw:
    """A sequence that gets a token from row `first_row` of the logits, and one from each row after it that it earns."""

    sequence: Sequence
    first_row: int
    guess: Guess
    num_accepted: int = 0
    num_checked: int = 0
    num_agreed: int = 0  # of the guesses that stand, those that the model says too: all, where it is asked


class Engine:
    """Answers requests, many at a time, one step after the other. Not thread-safe.

    Parameters
    ----------
    model : Transformer
    cache : KVCache
    tokenizer : Tokenizer
    max_model_len : int
        Most tokens of a prompt and its answer.
    max_num_seqs, max_num_batched_tokens : int
        See `Scheduler`.
    recycler : Recycler, optional
        Makes guesses of the tokens to come. They change how fast tokens come, never which, unless it does not verify.
    recycle_module : RecycleModule, optional
        The head that the recycler listens to; `cache` must have room for its layers.
    messages : StepMessages, optional
        To the ranks that have the other parts of the model.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        recycler: Recycler | None = None,
        recycle_module: RecycleModule | None = None,
        messages: StepMessages | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.recycler = recycler
        self.runner = Runner(
            model,
            cache,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_tokens=max_num_batched_tokens,
            max_decode_tokens=self.max_decode_tokens(recycler),
            messages=messages,
        )
        self.recycle_runner = None
        if recycle_module is not None:
            self.recycle_runner = RecycleRunner(recycle_module, cache, self.runner)
        if messages is not None:
            cache.copy_observer = messages.send_copy
        self.scheduler = Scheduler(cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
        self._requests: dict[str, Request] = {}
        self._request_of: dict[Sequence, tuple[Request, Answer]] = {}
        self._num_steps = self._num_prompt_tokens = self._num_generated_tokens = 0
        self._unused_slots = self._allocated_slots = 0

    @staticmethod
    def max_decode_tokens(recycler: Recycler | None) -> int:
        """Most tokens of a sequence in a step that only decodes: the next one, and guesses."""
        return 1 + (recycler.max_tokens if recycler else 0)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    def add_request(
        self, request_id: str, prompt_token_ids: SequenceOf[int], params: SamplingParams, prompt: str | None = None
    ) -> None:
        """Take in a request; `step` computes it.

        Raises
        ------
        ValueError
            When it can never be answered: prompt empty, not of this vocabulary, too long for the context or the cache.
            The engine is as it was.
        """
        token_ids = self._checked_tokens(prompt_token_ids, "prompt")
        max_tokens = self._checked_max_tokens(token_ids, params)
        if request_id in self._requests:
            raise ValueError(f"request_id: {request_id!r} is already in use")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        sequences = [
            Sequence(list(token_ids), len(token_ids), max_tokens, (seed + i * _SEED_STRIDE) % 2**63)
            for i in range(params.n)
        ]
        sequences[0].siblings = sequences[1:]
        answers = [Answer(i, sequence, params, self.tokenizer) for i, sequence in enumerate(sequences)]
        request = Request(request_id, prompt, token_ids, params, answers, RequestMetrics(time.monotonic()))
        self._requests[request_id] = request
        self._request_of |= {answer.sequence: (request, answer) for answer in answers}
        self.scheduler.add(sequences[0])
        self._num_prompt_tokens += len(token_ids)

    def _checked_tokens(self, token_ids: Iterable[int], name: str) -> list[int]:
        try:
            checked = [index(token) for token in token_ids]
        except TypeError:
            raise TypeError(f"{name}: expected a list of token ids, got {token_ids!r:.100}") from None
        vocab_size = self.model.config.vocab_size
        if outside := [token for token in checked if not 0 <= token < vocab_size]:
            raise ValueError(f"{name}: expected token ids from 0 to {vocab_size - 1}, got {outside[0]}")
        return checked

    def _checked_max_tokens(self, token_ids: list[int], params: SamplingParams) -> int:
        """Longest answer that fits; ValueError for a request that can never be answered."""
        if not token_ids:
            raise ValueError("prompt: expected at least one token, got none")
        self._checked_tokens(params.logit_bias or (), "logit_bias")
        self._checked_tokens(params.stop_token_ids or (), "stop_token_ids")
        vocab_size = self.model.config.vocab_size
        if params.logprobs is not None and params.logprobs > vocab_size:
            raise ValueError(f"logprobs: expected at most {vocab_size}, the vocabulary; got {params.logprobs}")
        if params.n > self.scheduler.max_num_seqs:
            raise ValueError(f"n: expected at most max_num_seqs, {self.scheduler.max_num_seqs}; got {params.n}")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"prompt: expected fewer tokens than max_model_len, {self.max_model_len}; got {len(token_ids)}"
            )
        # The last token of an answer is never computed, so it needs no slot.
        room = self.cache.pool.num_blocks * self.cache.block_size + 1 - len(token_ids)
        longest = self.max_model_len - len(token_ids)
        wanted = min(params.max_tokens, longest) if params.max_tokens is not None else min(longest, max(room, 1))
        if wanted > room:
            raise ValueError(
                f"prompt: {len(token_ids)} tokens and an answer of up to {wanted} need more than the KV cache's "
                f"{self.cache.pool.num_blocks} blocks of {self.cache.block_size} tokens"
            )
        return wanted

    def abort_request(self, request_id: str, reason: str = "abort") -> RequestOutput | None:
        """Drop a request, and give what it has come to, finish reason `reason`; None for unknown and finished ones."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request, reason)
        return request.take_output()

    def held_blocks(self) -> dict[str, list[list[int]]]:
        """KV blocks of the running requests' answers, by request; answers that share a block all list it."""
        held: dict[str, list[list[int]]] = {}
        for sequence in self.scheduler.running:
            request, _ = self._request_of[sequence]
            held.setdefault(request.request_id, []).append(list(sequence.blocks))
        return held

    def step(self) -> list[RequestOutput]:
        """Compute one batch.

        Returns
        -------
        list of RequestOutput
            The requests that got new tokens, ended, or failed. When a request's logits are not numbers it ends with
            finish reason "error"; all others go on.
        """
        if torch.is_inference_mode_enabled():  # to enter it anew takes tens of microseconds
            return self._step()
        with torch.inference_mode():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        started = time.perf_counter()
        batch = self.scheduler.schedule()
        if not batch:
            return []
        self._count_slots(batch)
        guesses = self._guess(batch)
        spans, drawing = [], []
        num_rows = 0
        for sequence, num_tokens in batch:
            is_complete = sequence.num_computed + num_tokens == len(sequence.token_ids)
            guess = guesses.get(sequence, NO_GUESS)
            spans.append(
                Span(
                    sequence.token_ids + guess.token_ids if guess.token_ids else sequence.token_ids,
                    sequence.num_computed,
                    num_tokens + len(guess.token_ids),
                    sequence.blocks,
                    want_logits=is_complete,
                    all_logits=bool(guess.token_ids),
                )
            )
            if is_complete:
                drawing.append(_Draw(sequence, num_rows, guess))
                num_rows += 1 + len(guess.token_ids)
        logits, likeliest = None, None
        if self.runner.finds_likeliest and all(self._is_greedy(draw) for draw in drawing):
            likeliest = self.runner.run_likeliest(spans)
        else:
            logits = self.runner.run(spans)
        for sequence, num_tokens in batch:
            self.scheduler.commit(sequence, num_tokens)
        num_generated = self._num_generated_tokens
        outputs = self._sample(drawing, logits, likeliest)
        if self.recycler is not None:
            if self.runner.replayed:
                self.recycler.cost.add(num_rows, time.perf_counter() - started)
            if self.recycle_runner is not None:
                try:
                    self._listen(self.recycler, self.recycle_runner, batch, spans, drawing)
                except Exception:
                    # The step's answers are complete, and go on without the head.
                    self.recycle_runner = None
                    _logger.exception("the recycle head failed, and is not used any more")
            if self.runner.replayed:
                num_tokens = self._num_generated_tokens - num_generated
                self.recycler.end_step(len(batch), num_tokens, time.perf_counter() - started)
        return outputs

    def _listen(
        self,
        recycler: Recycler,
        runner: RecycleRunner,
        batch: list[tuple[Sequence, int]],
        spans: list[Span],
        drawing: list[_Draw],
    ) -> None:
        """Let the head know what has followed each token of the step, and hear what it says will come.

        Prompts are never kept from it: their keys and values may serve other requests, and later steps.
        """
        listens = recycler.listens(len(batch))
        if not listens and self.runner.is_static:
            return
        started = time.perf_counter()
        next_ids: list[int] = []
        for (sequence, _), span in zip(batch, spans, strict=True):
            ids = sequence.token_ids[span.start + 1 : span.start + 1 + span.num_tokens]
            next_ids += ids + [0] * (span.num_tokens - len(ids))
        going_on = [draw for draw in drawing if draw.sequence in self._request_of] if listens else []
        asked = [draw for draw in going_on if not recycler.is_sure(draw.sequence)]
        runner.run(next_ids, speak=bool(asked))
        for draw in asked:
            recycler.hear(draw.sequence, *runner.said(draw.first_row + draw.num_accepted))
        if runner.replayed:
            cost = recycler.head_cost if asked else recycler.silent_cost
            cost.add(len(next_ids), time.perf_counter() - started)

    def _guess(self, batch: list[tuple[Sequence, int]]) -> dict[Sequence, Guess]:
        """Guesses for the sequences of a step that only decodes, with room in the cache reserved for them."""
        if self.recycler is None or any(
            num_tokens > 1 or sequence.num_computed + 1 < len(sequence.token_ids) for sequence, num_tokens in batch
        ):
            return {}
        # Siblings are about to share a sequence's blocks: what they share must hold the prompt and nothing after it.
        sequences = [sequence for sequence, _ in batch if not sequence.siblings and self._may_guess(sequence)]
        room = self.scheduler.max_num_batched_tokens - len(batch)
        accepted: dict[Sequence, Guess] = {}
        for sequence, guess in zip(sequences, self.recycler.propose(sequences), strict=True):
            count = len(guess.token_ids)
            if 0 < count <= room and self.scheduler.extend(sequence, count):
                accepted[sequence] = guess
                room -= count
        return accepted

    def _may_guess(self, sequence: Sequence) -> bool:
        """Unverified guesses are no match for parameters that say which tokens may come."""
        _, answer = self._request_of[sequence]
        return self.recycler is None or self.recycler.verify or draws_ahead(answer.params)

    def _is_greedy(self, draw: _Draw) -> bool:
        """Whether a sequence gets the likeliest token, whatever else there is."""
        _, answer = self._request_of[draw.sequence]
        return answer.params.temperature == 0 and draws_ahead(answer.params)

    def _sample(
        self, drawing: list[_Draw], logits: torch.Tensor | None, likeliest: list[int] | None
    ) -> list[RequestOutput]:
        """Give every sequence, and those that fork off it, its next tokens; by the logits, or by what they come to.

        One token at a time, where what is drawn depends on those before it. As long as a sequence draws just what was
        guessed, the row after it is that of its next token.
        """
        progressed: dict[str, Request] = {}
        if logits is not None and logits.dtype != torch.float32:
            logits = logits.float()
        drawn = self._draw_ahead(drawing, logits) if logits is not None else likeliest
        unsettled = drawing
        depth = 0
        while unsettled:
            tokens = self._draw(unsettled, depth, logits, drawn, progressed)
            going_on = []
            for draw, token_id in zip(unsettled, tokens, strict=True):
                guessed = draw.guess.token_ids
                draw.num_checked += depth < len(guessed)
                if depth < len(guessed) and token_id == guessed[depth]:
                    draw.num_accepted += 1
                    draw.num_agreed += self.recycler is None or self.recycler.verify
                    if draw.sequence in self._request_of:  # the answer goes on
                        self.scheduler.commit(draw.sequence, 1)
                        going_on.append(draw)
            unsettled = going_on
            depth += 1
        for draw in drawing:
            if draw.guess.token_ids and self.recycler is not None:
                self.recycler.learn(draw.sequence, draw.guess, draw.num_agreed, draw.num_checked)
                if draw.sequence in self._request_of:
                    self.scheduler.trim(draw.sequence)
        for request in progressed.values():
            if request.finished and request.request_id in self._requests:
                self._end(request, "stop")
        return [request.take_output() for request in progressed.values()]

    def _draw_ahead(self, drawing: list[_Draw], logits: torch.Tensor) -> list[int] | None:
        """A token for each row, if all can be drawn in one go."""
        answers: list[Answer] = []
        ahead: list[int] = []
        for draw in drawing:
            _, answer = self._request_of[draw.sequence]
            if draw.sequence.siblings or not draws_ahead(answer.params):
                return None
            distances = range(1 + len(draw.guess.token_ids))
            answers += [answer] * len(distances)
            ahead += distances
        return sample_tokens(logits, answers, ahead) if answers else []

    def _draw(
        self,
        draws: list[_Draw],
        depth: int,
        logits: torch.Tensor | None,
        drawn: list[int] | None,
        progressed: dict[str, Request],
    ) -> list[int]:
        """Draw and push one token for every sequence and those that fork off it; returns the sequences' own.

        `drawn` has the tokens of all rows of `logits`, where they are drawn already.
        """
        rows: list[int] = []
        drawing, own = [], []
        for draw in draws:
            family = [draw.sequence, *self.scheduler.fork(draw.sequence)]
            own.append(len(rows))
            drawing += [self._request_of[member] for member in family]
            rows += [draw.first_row + depth] * len(family)
        if drawn is not None:
            token_ids = [drawn[row] for row in rows]
        else:
            assert logits is not None
            first, end = rows[0], rows[0] + len(rows)
            logits = logits[first:end] if rows == list(range(first, end)) else logits[rows]
            plain = logits
            if any(answer.params.logprobs is not None for _, answer in drawing):
                plain = logits.clone()  # sampling changes its input
            token_ids = sample_tokens(logits, [answer for _, answer in drawing])
        if self.recycler is not None and not self.recycler.verify:
            for draw, row in zip(draws, own, strict=True):
                if depth < len(draw.guess.token_ids) and token_ids[row] != INVALID_TOKEN:
                    draw.num_agreed += token_ids[row] == draw.guess.token_ids[depth]
                    token_ids[row] = draw.guess.token_ids[depth]
        now = time.monotonic()
        for row, ((request, answer), token_id) in enumerate(zip(drawing, token_ids, strict=True)):
            progressed[request.request_id] = request
            if request.finished:  # an answer to the same prompt has just failed
                continue
            if token_id == INVALID_TOKEN:
                self._end(request, "error", f"request {request.request_id!r}: {_INVALID_LOGITS}")
                continue
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
                request.metrics.num_cached_tokens = answer.sequence.num_cached
            num_top = answer.params.logprobs
            logprobs = None if num_top is None else token_logprobs(plain[row], token_id, num_top, self.tokenizer)
            answer.push(token_id, logprobs)
            self._num_generated_tokens += 1
            if answer.finished:
                self.scheduler.remove([answer.sequence])
                del self._request_of[answer.sequence]
        return [token_ids[row] for row in own]

    def _end(self, request: Request, reason: str, error: str | None = None) -> None:
        """Take a request out; answers that still run end for `reason`."""
        for answer in request.answers:
            if not answer.finished:
                answer.finish(reason, error)
                self.scheduler.remove([answer.sequence])
                del self._request_of[answer.sequence]
        request.metrics.finished_time = time.monotonic()
        del self._requests[request.request_id]

    @torch.inference_mode()
    def score(self, token_ids: SequenceOf[int]) -> list[float]:
        """Log-probability of every token but the first, given those before it; at most `max_model_len` tokens.

        Raises
        ------
        ValueError
            When the text does not fit into the context, or into the blocks that running requests have left, has a
            token that is not of this vocabulary, or gets logits that are not numbers.
        """
        token_ids = self._checked_tokens(token_ids, "token_ids")
        if len(token_ids) > self.max_model_len:
            raise ValueError(f"token_ids: expected at most {self.max_model_len}, got {len(token_ids)}")
        num_blocks = -(-len(token_ids) // self.cache.block_size)
        blocks = self.cache.pool.allocate(num_blocks)
        if blocks is None:
            raise ValueError(
                f"token_ids: {len(token_ids)} tokens need {num_blocks} KV blocks, "
                f"{self.cache.pool.num_available} are available"
            )
        scores: list[float] = []
        chunk = min(self.scheduler.max_num_batched_tokens, _SCORE_ROWS)
        try:
            for start in range(0, len(token_ids) - 1, chunk):
                end = min(start + chunk, len(token_ids) - 1)
                span = Span(token_ids, start, end - start, blocks, all_logits=True)
                logits = self.runner.run([span])
                targets = torch.tensor(token_ids[start + 1 : end + 1]).unsqueeze(-1)
                scores += logits.float().log_softmax(-1).gather(-1, targets).squeeze(-1).tolist()
        finally:
            self.cache.pool.free(blocks)
        if any(map(isnan, scores)):
            raise ValueError(f"token_ids: {_INVALID_LOGITS}")
        return scores

    def _count_slots(self, batch: list[tuple[Sequence, int]]) -> None:
        """For the waste share: slots in used blocks, and those of them that hold no token when this step has run.

        Only a sequence's last block can have such slots; one that is shared counts once.
        """
        computed = dict(batch)
        block_size = self.cache.block_size
        unused = {
            sequence.blocks[-1]: len(sequence.blocks) * block_size - sequence.num_computed - computed.get(sequence, 0)
            for sequence in self.scheduler.running
            if sequence.blocks
        }
        self._unused_slots += sum(unused.values())
        self._allocated_slots += self.cache.pool.num_used * block_size
        self._num_steps += 1

    def metrics(self) -> dict[str, Any]:
        """Counters since the start, and the state of the cache.

        ``accepted_tokens`` are those of the ``guessed_tokens`` that the model says itself. ``kv_waste_share`` is the
        share of slots in used blocks that held no token, over all steps: a block counts as used while a running
        sequence holds it (once when several do), its slots as they are after the step.
        """
        pool = self.cache.pool
        return {
            "steps": self._num_steps,
            "requests_running": len(self.scheduler.running),
            "requests_waiting": len(self.scheduler.waiting),
            "prompt_tokens": self._num_prompt_tokens,
            "generated_tokens": self._num_generated_tokens,
            "guessed_tokens": self.recycler.num_guessed if self.recycler else 0,
            "accepted_tokens": self.recycler.num_accepted if self.recycler else 0,
            "preemptions": self.scheduler.num_preemptions,
            "prefix_cache_hit_tokens": self.scheduler.num_cached_tokens,
            "prefix_cache_queried_tokens": self.scheduler.num_queried_tokens,
            "kv_blocks": pool.num_blocks,
            "kv_block_size": pool.block_size,
            "kv_blocks_used": pool.num_used,
            "kv_blocks_cached": pool.num_cached,
            "kv_blocks_peak": pool.peak_used,
            "kv_waste_share": self._unused_slots / max(self._allocated_slots, 1),
            "kv_cache_bytes": self.cache.nbytes,
            "weight_bytes": self.model.nbytes + (self.recycle_runner.nbytes if self.recycle_runner else 0),
        }
