"""cp.async: copies that a thread starts, commits in groups, and waits for; their data arrive at the wait."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.active import Active
from ptx.memory import GlobalMemory
from ptx.shared import SharedMemory
from ptx.types import Array


@dataclass
class _Copy:
    """What one instruction has started, by its threads that have not waited yet."""

    threads: Array
    group: Array  # of each thread's own, counted from 0
    targets: Array
    sources: Array
    sizes: Array  # bytes that come from the source; zeros behind
    size: int


class Copies:
    """Those under way in a block."""

    def __init__(self, threads: int) -> None:
        self._committed = np.zeros(threads, np.int64)
        self._started: list[_Copy] = []

    def start(self, active: Active, targets: Array, sources: Array, sizes: Array, size: int) -> None:
        """Copies of `size` bytes by the active threads; other arrays hold a value for each of these."""
        threads = active.index
        self._started.append(_Copy(threads, self._committed[threads], targets, sources, sizes, size))

    def commit(self, active: Active) -> None:
        """What was started since the last commit is a group."""
        self._committed[active.index] += 1

    def wait(self, active: Active, pending: int | None, shared: SharedMemory, memory: GlobalMemory) -> None:
        """Let all groups but the last `pending` arrive; None: whatever was started."""
        left = []
        for copy in self._started:
            arrives = active.mask[copy.threads]
            if pending is not None:
                arrives = arrives & (copy.group < self._committed[copy.threads] - pending)
            if arrives.any():
                self._arrive(copy, arrives, shared, memory)
                if arrives.all():
                    continue
                kept = ~arrives
                arrays = (copy.threads, copy.group, copy.targets, copy.sources, copy.sizes)
                copy = _Copy(*(array[kept] for array in arrays), copy.size)
            left.append(copy)
        self._started = left

    def _arrive(self, copy: _Copy, which: Array, shared: SharedMemory, memory: GlobalMemory) -> None:
        sizes, sources = copy.sizes[which], copy.sources[which]
        data = np.zeros((len(sizes), copy.size), np.uint8)
        for size in np.unique(sizes[sizes > 0]).tolist():
            rows = sizes == size
            data[rows, :size] = memory.load(sources[rows], int(size), 1)
        shared.end_copy(copy.threads[which], copy.targets[which], data)
