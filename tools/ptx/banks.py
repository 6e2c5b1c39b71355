"""Bank conflicts of shared memory: how many times the banks are busy with an access of a warp.

There are 32 banks of 4 bytes. Threads that access one word share it; different words of one bank come one after the
other. An access of 8 bytes is made for a half warp at a time, one of 16 bytes for a quarter (CUDA C++ Best Practices
Guide, shared memory), and ldmatrix for the eight rows of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.active import WARP
from ptx.types import Array

BANKS = 32


@dataclass
class Access:
    """What the executions of an instruction took; `cycles` without any conflict would be `ideal`.

    Attributes
    ----------
    name : str
        The instruction's: "ld", "st", "cp", "ldmatrix".
    line : int
        Of the PTX.
    text : str
        The instruction.
    cycles, ideal : int
        Over all warps and executions.
    """

    name: str
    line: int
    text: str
    cycles: int = 0
    ideal: int = 0


class BankCounter:
    """Counts, instruction by instruction."""

    def __init__(self) -> None:
        self.accesses: dict[int, Access] = {}

    def count(self, name: str, line: int, text: str, threads: Array, addresses: Array, size: int) -> None:
        """An access of `size` bytes by these threads to these addresses [n]."""
        group = WARP if size <= 4 else WARP * 4 // size
        words = max(size // 4, 1)
        first = addresses.astype(np.int64) // 4
        access = self.accesses.setdefault(line, Access(name, line, text))
        cycles, groups = _cycles(threads // group, first[:, None] + np.arange(words))
        access.cycles += cycles
        access.ideal += groups

    def total(self) -> dict[str, tuple[int, int]]:
        """Cycles and their ideal, by the name of the instruction."""
        found: dict[str, tuple[int, int]] = {}
        for access in self.accesses.values():
            cycles, ideal = found.get(access.name, (0, 0))
            found[access.name] = (cycles + access.cycles, ideal + access.ideal)
        return found


def _cycles(groups: Array, words: Array) -> tuple[int, int]:
    """Cycles for words [n, words of an access] of groups [n] of threads, and how many groups there are."""
    keys = np.unique(np.broadcast_to(groups[:, None], words.shape).ravel() * (1 << 32) + words.ravel())
    bank = (keys >> 32) * BANKS + keys % BANKS
    group_of_bank, busy = np.unique(bank, return_counts=True)
    owner = group_of_bank // BANKS
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    return int(np.maximum.reduceat(busy, starts).sum()), len(starts)
