"""The machine's ceilings, measured: what no operator can exceed with the threads and instructions in use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from teco_kernels.ops.ceilings import READ_STREAMS, fma_probe, int8_probe, read_probe
from teco_kernels.testing.machine import available_bytes, l3_bytes

_PROBE_SECONDS = 2e-3  # of one arithmetic probe: long against starting the threads, short against the scheduler's slice


@dataclass(frozen=True)
class Ceilings:
    """Best rates seen, with all threads in use.

    Attributes
    ----------
    read_bandwidth : float
        Bytes per second from memory that no cache holds.
    fp32, int8 : float
        Operations per second, a multiply-add counting as two.
    """

    read_bandwidth: float
    fp32: float
    int8: float

    def peak(self, arithmetic: str) -> float:
        """Operations per second of a kind of arithmetic, "fp32" or "int8"."""
        return self.int8 if arithmetic == "int8" else self.fp32

    def shortest_time(self, bytes_moved: int, flops: int, arithmetic: str) -> float:
        """Seconds that the slower of memory and arithmetic needs when both reach their ceilings."""
        return max(bytes_moved / self.read_bandwidth, flops / self.peak(arithmetic))

    def __or__(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, each."""
        mine, others = asdict(self), asdict(other)
        return Ceilings(**{name: max(mine[name], others[name]) for name in mine})


class Prober:
    """Measures the ceilings, again and again: a shared or throttling machine shows its best only at times."""

    def __init__(self) -> None:
        # Several times what the caches hold, so that next to nothing of it is found there.
        size = min(max(4 * l3_bytes(), 64 << 20), 1 << 30, max(available_bytes() // 4, 16 << 20))
        self._data = torch.ones(size // 4)
        self._iterations: dict[Callable[[int], int], int] = {
            probe: _iterations(probe) for probe in (fma_probe, int8_probe)
        }

    def measure(self, seconds: float = 0.3) -> Ceilings:
        """Measure all three, each as the best of the runs that fit into so many seconds."""
        bandwidth = 0.0
        for streams in READ_STREAMS:
            read = partial(read_probe, self._data, streams)
            bandwidth = max(bandwidth, self._data.nbytes / _best(read, seconds / len(READ_STREAMS)))
        return Ceilings(bandwidth, self._rate(fma_probe, seconds), self._rate(int8_probe, seconds))

    def _rate(self, probe: Callable[[int], int], seconds: float) -> float:
        iterations = self._iterations[probe]
        return probe(iterations) / _best(partial(probe, iterations), seconds)


def _best(run: Callable[[], object], seconds: float) -> float:
    """Shortest time of one run among those of the next so many seconds."""
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def _iterations(probe: Callable[[int], int]) -> int:
    """As many as take about `_PROBE_SECONDS`."""
    iterations = 1000
    while True:
        start = time.perf_counter()
        probe(iterations)
        seconds = time.perf_counter() - start
        if seconds >= _PROBE_SECONDS / 2:
            return max(1, int(iterations * _PROBE_SECONDS / seconds))
        iterations *= 2
