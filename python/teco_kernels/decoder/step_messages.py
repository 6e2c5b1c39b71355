"""What the first rank tells the others: the steps to run, the blocks to copy, and when to end."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from teco_kernels.decoder.batch import Batch
from teco_kernels.parallel.collectives import broadcast
from teco_kernels.parallel.communicator import Communicator


class Kind(enum.IntEnum):
    """Of a message."""

    END = 0
    COPY_BLOCK = 1
    STEP = 2


@dataclass(frozen=True)
class Step:
    """A step to run; `is_static` and `best` as `Runner.compute` takes them."""

    batch: Batch
    is_static: bool
    best: bool


@dataclass(frozen=True)
class BlockCopy:
    """A block of the cache to copy."""

    source: int
    target: int


# A message is this many numbers, and as many more as the last of them says; all int64, so there is nothing to parse.
_HEADER = 8


class StepMessages:
    """Messages over a communicator: rank 0 sends, all others receive.

    Parameters
    ----------
    comm : Communicator
        Of its own, in which the receivers wait as long as it takes.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self._header = torch.zeros(_HEADER, dtype=torch.int64)
        self._fields = self._header.numpy()

    def send_step(self, batch: Batch, *, is_static: bool, best: bool, num_seqs: int, width: int) -> None:
        """Have the others run a step.

        Parameters
        ----------
        batch, is_static, best
            As for `Runner.compute`.
        num_seqs, width : int
            The part of the block table that is in use.
        """
        parts = [
            batch.token_ids,
            batch.positions,
            batch.slot_mapping,
            batch.seq_lens,
            batch.block_table[:num_seqs, :width].flatten(),
        ]
        if (starts := batch.query_start_loc) is not None:
            parts.append(starts)
        if (rows := batch.logit_rows) is not None:
            parts.append(rows)
        body = torch.cat([part.long() for part in parts])
        counts = (len(batch.seq_lens), num_seqs, width, starts is not None, -1 if rows is None else len(rows))
        self._send((Kind.STEP, 2 * is_static + best, *counts), body)

    def send_copy(self, source: int, target: int) -> None:
        """Have the others copy a block of their caches."""
        self._send((Kind.COPY_BLOCK, source, target))

    def send_end(self) -> None:
        """Tell the others that nothing more will come."""
        self._send((Kind.END,))

    def close(self) -> None:
        """End the communicator, and with it all ranks that wait for a message."""
        self.comm.close()

    def _send(self, fields: tuple[int, ...], body: Tensor | None = None) -> None:
        self._fields[: len(fields)] = fields
        self._fields[-1] = 0 if body is None else len(body)
        broadcast(self._header, self.comm, out=self._header)
        if body is not None:
            broadcast(body, self.comm, out=body)

    def receive(self) -> Step | BlockCopy | None:
        """Wait for the next message; None for the end."""
        broadcast(self._header, self.comm, out=self._header)
        kind, first, *counts, size = self._fields.tolist()
        if kind == Kind.END:
            return None
        if kind == Kind.COPY_BLOCK:
            return BlockCopy(first, counts[0])
        body = torch.empty(size, dtype=torch.int64)
        broadcast(body, self.comm, out=body)
        return Step(_batch(body, *counts[:5]), is_static=bool(first & 2), best=bool(first & 1))


def _batch(body: Tensor, all_seqs: int, num_seqs: int, width: int, has_starts: int, num_rows: int) -> Batch:
    """The batch whose parts `body` has, one after the other; see `StepMessages.send_step`."""
    after = all_seqs + num_seqs * width + (all_seqs + 1) * has_starts + max(num_rows, 0)
    num_tokens = (len(body) - after) // 3
    sizes = [num_tokens, num_tokens, num_tokens, all_seqs, num_seqs * width]
    sizes += [all_seqs + 1] if has_starts else []
    sizes += [num_rows] if num_rows >= 0 else []
    token_ids, positions, slots, lengths, table, *rest = body.split(sizes)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slots,
        block_table=table.int().view(num_seqs, width),
        seq_lens=lengths.int(),
        query_start_loc=rest[0].int() if has_starts else None,
        logit_rows=rest[-1] if num_rows >= 0 else None,
    )
