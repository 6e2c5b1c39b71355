"""Runs the recycle head after the steps of its model: as they come, or from recorded plans as they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import exp, isfinite

import torch

from teco_kernels.decoder.batch import Batch
from teco_kernels.decoder.kv_cache import KVCache
from teco_kernels.decoder.recycle_module import RecycleModule
from teco_kernels.decoder.runner import Runner
from teco_kernels.ops import Plan


class RecycleRunner:
    """A recycle head, and memory at fixed addresses for what it reads and says.

    It works on the rows of the step that the model has just run, with its positions, slots and block tables: only the
    tokens are other ones, those that follow. Rows of guesses that were rejected are run along; what they leave in the
    cache lies where the sequence's next tokens will go.

    Parameters
    ----------
    module : RecycleModule
    cache : KVCache
        With layers for the head.
    runner : Runner
        Of the model.

    Attributes
    ----------
    replayed : bool
        Whether the last run was replayed.
    """

    def __init__(self, module: RecycleModule, cache: KVCache, runner: Runner) -> None:
        self._module, self._cache, self._runner = module, cache, runner
        max_tokens = len(runner.buffers.hidden)
        self._next_ids = torch.zeros(max_tokens, dtype=torch.int64)
        self._said = torch.zeros(max_tokens, dtype=torch.int64), torch.zeros(max_tokens, dtype=torch.float32)
        self._logsumexp = torch.zeros(max_tokens, dtype=torch.float32)
        self._next_column = self._next_ids.numpy()
        self._said_columns = [tensor.numpy() for tensor in (*self._said, self._logsumexp)]
        vocabulary = module.draft_vocabulary
        self._vocabulary = None if vocabulary is None else vocabulary.tolist()
        self._plans: dict[tuple[int, bool], Plan] = {}
        self.replayed = False

    @property
    def nbytes(self) -> int:
        """Bytes of the head's weights."""
        return self._module.nbytes

    def run(self, next_ids: Sequence[int], *, speak: bool) -> None:
        """Take in what follows each token of the model's last step.

        Parameters
        ----------
        next_ids : sequence of int
            ``[T]``; any token of the vocabulary where none follows, or a guess was rejected.
        speak : bool
            Whether to say what may come after the rows whose logits were wanted; else only keys and values are written.
        """
        num_tokens = len(next_ids)
        self._next_column[:num_tokens] = next_ids
        key = num_tokens, speak
        self.replayed = self._runner.is_static and key in self._plans
        if self.replayed:
            self._plans[key].replay()
            return
        batch = replace(self._runner.batch, token_ids=self._next_ids[:num_tokens])
        if self._runner.is_static:
            memory = self._module, self._cache, self._runner.buffers, batch, self._said, self._logsumexp
            self._plans[key] = Plan(lambda: self._run(batch, speak), keep_alive=memory)
        else:
            self._run(batch, speak)

    def said(self, row: int) -> tuple[int, float]:
        """What was said after a row of the model's logits: a token id, and its probability; -1 where there is none."""
        found, logit, logsumexp = (column[row].item() for column in self._said_columns)
        if found < 0 or not isfinite(logit - logsumexp):
            return -1, 0.0
        return (found if self._vocabulary is None else self._vocabulary[found]), exp(logit - logsumexp)

    def _run(self, batch: Batch, speak: bool) -> None:
        hidden = self._runner.buffers.hidden[: len(batch.token_ids)]
        states = self._module.forward(batch, hidden, self._cache.head_layers)
        if speak:
            states = states if batch.logit_rows is None else states[batch.logit_rows]
            token_ids, logits = (tensor[: len(states)] for tensor in self._said)
            self._module.speak(states, (token_ids, logits), self._logsumexp[: len(states)])
