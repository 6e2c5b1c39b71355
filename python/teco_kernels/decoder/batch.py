"""The tokens of one step as the tensors that the operators read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Span(NamedTuple):
    """`num_tokens` tokens of one sequence to compute, from position `start`; `all_logits`: not only the last one's."""

    token_ids: Sequence[int]
    start: int
    num_tokens: int
    blocks: Sequence[int]
    want_logits: bool = True
    all_logits: bool = False

    def slot(self, position: int, block_size: int) -> int:
        """Where the key and the value of the token at `position` go."""
        return self.blocks[position // block_size] * block_size + position % block_size


class BatchArrays(NamedTuple):
    """The tensors of a `Batch` as arrays, in the same memory: reading and writing them costs a fraction."""

    token_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    seq_lens: np.ndarray
    block_table: np.ndarray
    query_start_loc: np.ndarray | None
    logit_rows: np.ndarray | None

    def to_batch(self) -> Batch:
        """As tensors, of the dtypes that these must have."""
        int32 = {"seq_lens", "block_table", "query_start_loc"}
        tensors = {
            name: None if array is None else torch.from_numpy(array.astype(np.int32 if name in int32 else np.int64))
            for name, array in self._asdict().items()
        }
        return Batch(**tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Batch:
    """The tokens of one step: `T` tokens of `S` sequences, one sequence after the other.

    Attributes
    ----------
    token_ids, positions : Tensor
        int64 ``[T]``.
    slot_mapping : Tensor
        int64 ``[T]``: where each token's key and value go, ``block * block_size + offset``.
    block_table : Tensor
        int32 ``[S, max_blocks]``.
    seq_lens : Tensor
        int32 ``[S]``: tokens with keys and values, this step's included.
    query_start_loc : Tensor or None
        int32 ``[S + 1]``; None when every sequence has one token.
    logit_rows : Tensor or None
        int64 ``[R]``: the tokens whose logits are wanted; None for all.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor | None
    logit_rows: Tensor | None

    @classmethod
    def from_spans(cls, spans: Sequence[Span], block_size: int) -> Batch:
        """Lay the spans out one after the other."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        rows: list[int] = []
        width = max(len(span.blocks) for span in spans)
        table = []
        for span in spans:
            end = span.start + span.num_tokens
            token_ids += span.token_ids[span.start : end]
            positions += range(span.start, end)
            slots += [span.slot(position, block_size) for position in range(span.start, end)]
            table.append([*span.blocks, *[0] * (width - len(span.blocks))])
            if span.want_logits:
                rows += range(starts[-1] if span.all_logits else len(token_ids) - 1, len(token_ids))
            starts.append(len(token_ids))
        return cls(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_table=torch.tensor(table, dtype=torch.int32),
            seq_lens=torch.tensor([span.start + span.num_tokens for span in spans], dtype=torch.int32),
            query_start_loc=None if len(token_ids) == len(spans) else torch.tensor(starts, dtype=torch.int32),
            logit_rows=None if len(rows) == len(token_ids) else torch.tensor(rows, dtype=torch.int64),
        )

    @cached_property
    def arrays(self) -> BatchArrays:
        """The same memory as arrays."""
        return BatchArrays(
            self.token_ids.numpy(),
            self.positions.numpy(),
            self.slot_mapping.numpy(),
            self.seq_lens.numpy(),
            self.block_table.numpy(),
            None if self.query_start_loc is None else self.query_start_loc.numpy(),
            None if self.logit_rows is None else self.logit_rows.numpy(),
        )

    def first(self, num_tokens: int) -> Batch:
        """The first tokens, and as many sequences, of a batch that has logits of every token; in the same memory."""
        assert self.query_start_loc is not None
        return Batch(
            token_ids=self.token_ids[:num_tokens],
            positions=self.positions[:num_tokens],
            slot_mapping=self.slot_mapping[:num_tokens],
            block_table=self.block_table[:num_tokens],
            seq_lens=self.seq_lens[:num_tokens],
            query_start_loc=self.query_start_loc[: num_tokens + 1],
            logit_rows=None,
        )
