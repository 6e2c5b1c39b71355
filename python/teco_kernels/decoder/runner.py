"""Runs the steps of a model: as they come, or, where every sequence has one token, from a recorded plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teco_kernels.decoder.batch import Batch, Span
from teco_kernels.decoder.kv_cache import KVCache
from teco_kernels.decoder.model import Buffers, Transformer
from teco_kernels.ops import Plan

_MAX_PLANS = 128  # sizes of a step that are remembered


class Runner:
    """A model, its cache, and memory at fixed addresses for all that a step computes.

    A decode step of a known number of sequences and tokens differs from the last one in its token ids, positions, slots
    and block tables only. The first such step is recorded as a `Plan`; later ones fill these in and replay it. Both
    give the same bits: they are the same kernel calls.

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
        self.replayed = False
        self.buffers = Buffers.allocate(model.config, max(max_tokens, max_num_seqs), model.dtype)
        max_blocks = -(-max_model_len // cache.block_size)
        self._max_decode_tokens = max_decode_tokens
        self._max_planned = min(max_num_seqs * max_decode_tokens, max(max_tokens, max_num_seqs))
        decode = self._decode = Batch(
            token_ids=torch.zeros(self._max_planned, dtype=torch.int64),
            positions=torch.zeros(self._max_planned, dtype=torch.int64),
            slot_mapping=torch.zeros(self._max_planned, dtype=torch.int64),
            block_table=torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32),
            seq_lens=torch.zeros(max_num_seqs, dtype=torch.int32),
            query_start_loc=torch.zeros(max_num_seqs + 1, dtype=torch.int32),
            logit_rows=None,
        )
        assert decode.query_start_loc is not None
        # Written through numpy, which takes a tenth of the time.
        self._per_token = [tensor.numpy() for tensor in (decode.token_ids, decode.positions, decode.slot_mapping)]
        self._per_sequence = [tensor.numpy() for tensor in (decode.seq_lens, decode.query_start_loc[1:])]
        self._block_table = decode.block_table.numpy()
        self._logits = torch.empty(self._max_planned, model.config.vocab_size, dtype=model.dtype)
        self._plans: dict[tuple[int, int], Plan] = {}

    def run(self, spans: Sequence[Span]) -> Tensor:
        """Compute the spans' tokens.

        Returns
        -------
        Tensor
            Logits ``[R, vocab_size]`` of the tokens for which they are wanted; overwritten by the next step.
        """
        num_tokens = sum(span.num_tokens for span in spans)
        if num_tokens <= self._max_planned and all(self._is_decode(span) for span in spans):
            return self._replay(spans, num_tokens)
        self.replayed = False
        return self.model.forward(Batch.from_spans(spans, self.cache.block_size), self.cache, self.buffers)

    def _is_decode(self, span: Span) -> bool:
        few = span.num_tokens <= self._max_decode_tokens
        return span.want_logits and few and (span.all_logits or span.num_tokens == 1)

    def _replay(self, spans: Sequence[Span], num_tokens: int) -> Tensor:
        self._fill(spans)
        logits = self._logits[:num_tokens]
        size = len(spans), num_tokens
        plan = self._plans.pop(size, None)
        self.replayed = plan is not None
        if plan is not None:
            plan.replay()
        else:
            batch = self._decode.first(*size)
            memory = (self.model, self.cache, self.buffers, batch, logits)
            plan = Plan(lambda: self.model.forward(batch, self.cache, self.buffers, out=logits), keep_alive=memory)
        self._plans[size] = plan  # the last one in the order of use
        if len(self._plans) > _MAX_PLANS:
            del self._plans[next(iter(self._plans))]
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
        for column, per_token in zip(self._per_token, (token_ids, positions, slots), strict=True):
            column[: len(per_token)] = per_token
        for column, per_sequence in zip(self._per_sequence, (lengths, ends), strict=True):
            column[: len(per_sequence)] = per_sequence
