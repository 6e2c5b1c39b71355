"""Runs the steps of a model: as they come, or, where every sequence has one token, from a recorded plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teco_kernels.decoder.batch import Batch, Span
from teco_kernels.decoder.kv_cache import KVCache
from teco_kernels.decoder.model import Buffers, Transformer
from teco_kernels.ops import Plan


class Runner:
    """A model, its cache, and memory at fixed addresses for all that a step computes.

    A decode step of a known number of sequences differs from the last one in its token ids, positions, slots and block
    tables only. The first such step is recorded as a `Plan`; later ones fill these in and replay it. Both give
    the same bits: they are the same kernel calls.

    Parameters
    ----------
    model : Transformer
    cache : KVCache
    max_model_len, max_num_seqs, max_tokens : int
        Most tokens of a sequence, sequences of a step, and tokens of a step.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, *, max_model_len: int, max_num_seqs: int, max_tokens: int
    ) -> None:
        self.model = model
        self.cache = cache
        self.buffers = Buffers.allocate(model.config, max(max_tokens, max_num_seqs), model.dtype)
        max_blocks = -(-max_model_len // cache.block_size)
        self._decode = Batch(
            token_ids=torch.zeros(max_num_seqs, dtype=torch.int64),
            positions=torch.zeros(max_num_seqs, dtype=torch.int64),
            slot_mapping=torch.zeros(max_num_seqs, dtype=torch.int64),
            block_table=torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32),
            seq_lens=torch.zeros(max_num_seqs, dtype=torch.int32),
            query_start_loc=None,
            logit_rows=None,
        )
        self._logits = torch.empty(max_num_seqs, model.config.vocab_size, dtype=model.dtype)
        self._plans: dict[int, Plan] = {}

    def run(self, spans: Sequence[Span]) -> Tensor:
        """Compute the spans' tokens.

        Returns
        -------
        Tensor
            Logits ``[R, vocab_size]`` of the tokens for which they are wanted; overwritten by the next step.
        """
        if all(span.num_tokens == 1 and span.want_logits for span in spans):
            return self._replay(spans)
        return self.model.forward(Batch.from_spans(spans, self.cache.block_size), self.cache, self.buffers)

    def _replay(self, spans: Sequence[Span]) -> Tensor:
        num_seqs = len(spans)
        self._fill(spans)
        logits = self._logits[:num_seqs]
        if num_seqs in self._plans:
            self._plans[num_seqs].replay()
        else:
            batch = self._decode.first(num_seqs)
            memory = (self.model, self.cache, self.buffers, batch, logits)
            self._plans[num_seqs] = Plan(
                lambda: self.model.forward(batch, self.cache, self.buffers, out=logits), keep_alive=memory
            )
        return logits

    def _fill(self, spans: Sequence[Span]) -> None:
        decode, block_size, num_seqs = self._decode, self.cache.block_size, len(spans)
        positions = [span.start for span in spans]
        decode.token_ids.numpy()[:num_seqs] = [span.token_ids[span.start] for span in spans]
        decode.positions.numpy()[:num_seqs] = positions
        decode.seq_lens.numpy()[:num_seqs] = [position + 1 for position in positions]
        decode.slot_mapping.numpy()[:num_seqs] = [span.slot(span.start, block_size) for span in spans]
        table = decode.block_table.numpy()
        for row, span in enumerate(spans):
            table[row, : len(span.blocks)] = span.blocks
