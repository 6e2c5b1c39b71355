"""What the first rank tells the others: the steps to run, the blocks to copy, and when to end."""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np
import torch

from teco_kernels.decoder.batch import Batch, BatchArrays
from teco_kernels.parallel.collectives import broadcast
from teco_kernels.parallel.communicator import Communicator


class Kind(enum.IntEnum):
    """Of a message."""

    END = 0
    COPY_BLOCK = 1
    STEP = 2


class Step(NamedTuple):
    """A step to run; `is_static` and `best` as `Runner.compute` takes them."""

    arrays: BatchArrays
    is_static: bool
    best: bool


class BlockCopy(NamedTuple):
    """A block of the cache to copy."""

    source: int
    target: int


# A message is so many int64 numbers: a few fields, the size of the body, and the body, or as much of it as there is
# room for. The rest follows, if any. Of a decode step it is nearly never.
_HEADER, _FIRST = 8, 256


class StepMessages:
    """Messages over a communicator: rank 0 sends, all others receive.

    Parameters
    ----------
    comm : Communicator
        Of its own, in which the receivers wait as long as it takes.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self._first = torch.zeros(_FIRST, dtype=torch.int64)
        self._numbers = self._first.numpy()

    def send_step(self, batch: Batch, *, is_static: bool, best: bool, num_seqs: int, width: int) -> None:
        """Have the others run a step.

        Parameters
        ----------
        batch, is_static, best
            As for `Runner.compute`.
        num_seqs, width : int
            The part of the block table that is in use.
        """
        arrays = batch.arrays
        parts = [arrays.token_ids, arrays.positions, arrays.slot_mapping, arrays.seq_lens]
        parts.append(arrays.block_table[:num_seqs, :width].ravel())
        parts += [part for part in (arrays.query_start_loc, arrays.logit_rows) if part is not None]
        num_rows = -1 if arrays.logit_rows is None else len(arrays.logit_rows)
        flags = 4 * (arrays.query_start_loc is not None) + 2 * is_static + best
        counts = (len(arrays.token_ids), len(arrays.seq_lens), num_seqs, width, num_rows)
        self._send((Kind.STEP, flags, *counts), np.concatenate(parts, dtype=np.int64))

    def send_copy(self, source: int, target: int) -> None:
        """Have the others copy a block of their caches."""
        self._send((Kind.COPY_BLOCK, source, target))

    def send_end(self) -> None:
        """Tell the others that nothing more will come."""
        self._send((Kind.END,))

    def close(self) -> None:
        """End the communicator, and with it all ranks that wait for a message."""
        self.comm.close()

    def _send(self, fields: tuple[int, ...], body: np.ndarray | None = None) -> None:
        size = 0 if body is None else len(body)
        self._numbers[: len(fields)] = fields
        self._numbers[_HEADER - 1] = size
        if body is not None:
            self._numbers[_HEADER : _HEADER + size] = body[: _FIRST - _HEADER]
        broadcast(self._first, self.comm, out=self._first)
        if body is not None and size > _FIRST - _HEADER:
            rest = torch.from_numpy(body[_FIRST - _HEADER :])
            broadcast(rest, self.comm, out=rest)

    def receive(self) -> Step | BlockCopy | None:
        """Wait for the next message; None for the end. What a step has is overwritten by the message after it."""
        broadcast(self._first, self.comm, out=self._first)
        kind, flags, *counts, size = self._numbers[:_HEADER].tolist()
        if kind == Kind.END:
            return None
        if kind == Kind.COPY_BLOCK:
            return BlockCopy(flags, counts[0])
        body = self._numbers[_HEADER : _HEADER + size]
        if size > len(body):
            rest = torch.empty(size - len(body), dtype=torch.int64)
            broadcast(rest, self.comm, out=rest)
            body = np.concatenate((body, rest.numpy()))
        return Step(_arrays(body, bool(flags & 4), *counts), is_static=bool(flags & 2), best=bool(flags & 1))


def _arrays(
    body: np.ndarray, has_starts: bool, num_tokens: int, all_seqs: int, num_seqs: int, width: int, num_rows: int
) -> BatchArrays:
    """The arrays that `body` has, one after the other; see `StepMessages.send_step`."""
    begin = 0

    def take(size: int) -> np.ndarray:
        nonlocal begin
        begin += size
        return body[begin - size : begin]

    return BatchArrays(
        token_ids=take(num_tokens),
        positions=take(num_tokens),
        slot_mapping=take(num_tokens),
        seq_lens=take(all_seqs),
        block_table=take(num_seqs * width).reshape(num_seqs, width),
        query_start_loc=take(all_seqs + 1) if has_starts else None,
        logit_rows=take(num_rows) if num_rows >= 0 else None,
    )
