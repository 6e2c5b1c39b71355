"""Runs the steps of a model: as they come, or, where every sequence has one token, from a recorded plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teco_kernels.decoder.batch import Batch, BatchArrays, Span
from teco_kernels.decoder.kv_cache import KVCache
from teco_kernels.decoder.layers import Buffers
from teco_kernels.decoder.model import Best, Transformer
from teco_kernels.decoder.step_messages import StepMessages
from teco_kernels.ops import Plan

#: See `Runner.observer`.
Observer = Callable[[Sequence[Span], Tensor, Tensor], None]


class Runner:
    """A model, its cache, and memory at fixed addresses for all that a step computes.

    A decode step of a known number of tokens differs from the last one in its token ids, positions, slots, block tables
    and in how the tokens are shared out among sequences (for the plan there are as many sequences as tokens, the last
    ones without any). The first such step is recorded as a `Plan`; later ones fill these in and replay it. Both give
    the same bits: they are the same kernel calls.

    Parameters
    ----------
    model : Transformer
    cache : KVCache
    max_model_len, max_num_seqs, max_tokens : int
        Most tokens of a sequence, sequences of a step, and tokens of a step.
    max_decode_tokens : int
        Most tokens of one sequence in a step that is replayed: the next one, and guesses of those after it.
    messages : StepMessages, optional
        To the ranks that have the other parts of the model: each step is told to them before it is run. After a step
        that failed here they are told no other, as nobody knows how far they are.

    Attributes
    ----------
    replayed : bool
        Whether the last step was replayed, rather than run eagerly or recorded.
    batch : Batch
        The last step's.
    is_static : bool
        Whether `batch` lies where every step of as many tokens that was planned has it.
    observer : callable or None
        Called after each step with its spans, the input of the LM head for each of their tokens ``[T, hidden_size]``
        (the last hidden state after the final norm), and the logits that were wanted. Overwritten by the next step.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_tokens: int,
        max_decode_tokens: int = 1,
        messages: StepMessages | None = None,
    ) -> None:
        self.model = model
        self._messages = messages
        self.cache = cache
        self.replayed = self.is_static = False
        self.observer: Observer | None = None
        shared = None if model.comm is None else model.comm.registered
        self.buffers = Buffers.allocate(model.shape, max(max_tokens, max_num_seqs), model.dtype, shared)
        max_blocks = -(-max_model_len // cache.block_size)
        self._max_decode_tokens = max_decode_tokens
        self._max_planned = min(max_num_seqs * max_decode_tokens, max(max_tokens, max_num_seqs))
        decode = self._decode = Batch(
            token_ids=torch.zeros(self._max_planned, dtype=torch.int64),
            positions=torch.zeros(self._max_planned, dtype=torch.int64),
            slot_mapping=torch.zeros(self._max_planned, dtype=torch.int64),
            block_table=torch.zeros(self._max_planned, max_blocks, dtype=torch.int32),
            seq_lens=torch.zeros(self._max_planned, dtype=torch.int32),
            query_start_loc=torch.zeros(self._max_planned + 1, dtype=torch.int32),
            logit_rows=None,
        )
        assert decode.query_start_loc is not None
        # Written through numpy views, made once: each costs microseconds, and a step fills in all of them.
        per_token = (decode.token_ids, decode.positions, decode.slot_mapping)
        self._columns = [tensor.numpy() for tensor in (*per_token, decode.seq_lens, decode.query_start_loc[1:])]
        self._block_table = decode.block_table.numpy()
        self._logits = torch.empty(self._max_planned, model.logits_width, dtype=model.dtype)
        self._plans: dict[tuple[int, bool], tuple[Plan, Batch, Tensor | Best]] = {}
        self._static_batches: dict[int, Batch] = {}
        self.batch = decode

    def run(self, spans: Sequence[Span]) -> Tensor:
        """Compute the spans' tokens.

        Returns
        -------
        Tensor
            Logits ``[R, vocab_size]`` of the tokens for which they are wanted; overwritten by the next step.
        """
        logits = self._run(spans, best=False)
        assert isinstance(logits, Tensor)
        if self.observer is not None:
            self.observer(spans, self.buffers.hidden[: sum(span.num_tokens for span in spans)], logits)
        return logits

    @property
    def finds_likeliest(self) -> bool:
        """Whether `run_likeliest` can be called: where logits, which nobody else wants to see, have all their bits."""
        return self.model.dtype == torch.float32 and self.observer is None

    def run_likeliest(self, spans: Sequence[Span]) -> list[int]:
        """Compute the spans' tokens; nowhere are there all logits of a row.

        Returns
        -------
        list of int
            The likeliest next token, the lowest among equals, after each of the tokens whose logits are wanted; -1
            where they are not finite.
        """
        best = self._run(spans, best=True)
        assert not isinstance(best, Tensor)
        return self.model.likeliest(best)

    def _run(self, spans: Sequence[Span], *, best: bool) -> Tensor | Best:
        num_tokens = sum(span.num_tokens for span in spans)
        is_static = num_tokens <= self._max_planned and all(self._is_decode(span) for span in spans)
        if is_static:
            self._fill(spans)
            batch = self.static_batch(num_tokens)
        else:
            batch = Batch.from_spans(spans, self.cache.block_size)
        if self._messages is None:
            return self.compute(batch, is_static=is_static, best=best)
        try:
            width = max(len(span.blocks) for span in spans)
            self._messages.send_step(batch, is_static=is_static, best=best, num_seqs=len(spans), width=width)
            return self.compute(batch, is_static=is_static, best=best)
        except BaseException:
            self._messages.close()
            raise

    def static_batch(self, num_tokens: int) -> Batch:
        """Where a step of so many tokens that is replayed has its batch."""
        if num_tokens not in self._static_batches:
            self._static_batches[num_tokens] = self._decode.first(num_tokens)
        return self._static_batches[num_tokens]

    def fill_from(self, arrays: BatchArrays) -> Batch:
        """Copy a batch to where a step that is replayed has it; of the block table, as much as there is."""
        static = self.static_batch(len(arrays.token_ids))
        for own, given in zip(static.arrays, arrays, strict=True):
            if own is None or given is None:
                continue
            if own.ndim == 2:
                own = own[: given.shape[0], : given.shape[1]]
            own[...] = given
        return static

    def compute(self, batch: Batch, *, is_static: bool, best: bool) -> Tensor | Best:
        """Run a step that is laid out.

        Parameters
        ----------
        batch : Batch
        is_static : bool
            It is a `static_batch`.
        best : bool
            Give what `Transformer.best` does, instead of logits.
        """
        self.batch, self.is_static = batch, is_static
        self.replayed = False
        # A plan holds calls of this package: not those of a process group.
        if not is_static or (self.model.comm is not None and not self.model.comm.is_recordable):
            return self._forward(batch, None, best)
        num_tokens = len(batch.arrays.token_ids)  # asking torch takes tens of microseconds, here
        if (key := (num_tokens, best)) in self._plans:
            plan, self.batch, out = self._plans[key]
            self.replayed = True
            plan.replay()
        else:
            out = self._best(num_tokens) if best else self._logits[:num_tokens]
            plan = Plan(
                lambda: self._forward(batch, out, best), keep_alive=(self.model, self.cache, self.buffers, batch, out)
            )
            self._plans[key] = plan, batch, out
        return out[:, : self.model.config.vocab_size] if isinstance(out, Tensor) else out

    def _forward(self, batch: Batch, out: Tensor | Best | None, best: bool) -> Tensor | Best:
        if not best:
            assert out is None or isinstance(out, Tensor)
            return self.model.forward(batch, self.cache, self.buffers, out=out)
        if out is None:
            rows = batch.logit_rows
            out = self._best(len(batch.token_ids) if rows is None else len(rows))
        assert not isinstance(out, Tensor)
        self.model.best(batch, self.cache, self.buffers, out=out)
        return out

    def _best(self, num_rows: int) -> Best:
        return Best.allocate(1 if self.model.comm is None else self.model.comm.world_size, num_rows)

    def _is_decode(self, span: Span) -> bool:
        few = span.num_tokens <= self._max_decode_tokens
        return span.want_logits and few and (span.all_logits or span.num_tokens == 1)

    def _fill(self, spans: Sequence[Span]) -> None:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        lengths: list[int] = []
        ends: list[int] = []
        block_size = self.cache.block_size
        for row, span in enumerate(spans):
            end = span.start + span.num_tokens
            token_ids += span.token_ids[span.start : end]
            positions += range(span.start, end)
            slots += [span.slot(position, block_size) for position in range(span.start, end)]
            lengths.append(end)
            ends.append(len(token_ids))
            self._block_table[row, : len(span.blocks)] = span.blocks
        num_tokens, num_empty = len(token_ids), len(token_ids) - len(spans)
        lengths += [0] * num_empty
        ends += [num_tokens] * num_empty
        for column, values in zip(self._columns, (token_ids, positions, slots, lengths, ends), strict=True):
            column[:num_tokens] = values
