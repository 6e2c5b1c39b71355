"""Runs the steps of a model: as they come, or, where every sequence has one token, from a recorded plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teco_kernels.decoder.batch import Batch, Span
from teco_kernels.decoder.kv_cache import KVCache
from teco_kernels.decoder.layers import Buffers
from teco_kernels.decoder.model import Transformer
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
    ) -> None:
        self.model = model
        self.cache = cache
        self.replayed = self.is_static = False
        self.observer: Observer | None = None
        self.buffers = Buffers.allocate(model.config, max(max_tokens, max_num_seqs), model.dtype)
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
        self._logits = torch.empty(self._max_planned, model.config.vocab_size, dtype=model.dtype)
        self._plans: dict[int, tuple[Plan, Batch]] = {}
        self.batch = decode

    def run(self, spans: Sequence[Span]) -> Tensor:
        """Compute the spans' tokens.

        Returns
        -------
        Tensor
            Logits ``[R, vocab_size]`` of the tokens for which they are wanted; overwritten by the next step.
        """
        num_tokens = sum(span.num_tokens for span in spans)
        self.is_static = num_tokens <= self._max_planned and all(self._is_decode(span) for span in spans)
        if self.is_static:
            logits = self._replay(spans, num_tokens)
        else:
            self.replayed = False
            self.batch = Batch.from_spans(spans, self.cache.block_size)
            logits = self.model.forward(self.batch, self.cache, self.buffers)
        if self.observer is not None:
            self.observer(spans, self.buffers.hidden[:num_tokens], logits)
        return logits

    def _is_decode(self, span: Span) -> bool:
        few = span.num_tokens <= self._max_decode_tokens
        return span.want_logits and few and (span.all_logits or span.num_tokens == 1)

    def _replay(self, spans: Sequence[Span], num_tokens: int) -> Tensor:
        self._fill(spans)
        logits = self._logits[:num_tokens]
        self.replayed = num_tokens in self._plans
        if self.replayed:
            plan, self.batch = self._plans[num_tokens]
            plan.replay()
        else:
            batch = self.batch = self._decode.first(num_tokens)
            memory = (self.model, self.cache, self.buffers, batch, logits)
            plan = Plan(lambda: self.model.forward(batch, self.cache, self.buffers, out=logits), keep_alive=memory)
            self._plans[num_tokens] = plan, batch
        return logits

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
