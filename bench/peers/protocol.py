"""What every peer's process does: answers requests, one JSON object per line of stdin and stdout.

    {"description": ...}                          said at the start
    {"prepare": problem, "between": [low, high]}  -> {"nbytes": bytes of one copy of the operand, "copies": number}
    {"bind": rows}                                -> {"error": relative error of the result}
    {"run": passes}                               -> {"seconds": per call, over passes that use each copy once}

What a peer cannot do is answered with {"reason": ...}. `between` are the bytes that all copies of the weights (or of
keys and values) together should take: at least `low`, so that they come from memory, at most `high`, so that they stay
in a cache.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from problems import Array, Attention, Matmul, Problem, problem_from

_LONG_PASS = 0.5  # seconds: beside it, waking threads does not count
_LOOK = 5e-3  # seconds between two looks at whether threads still spin
_SETTLED_AFTER = 1.0  # seconds: what spins for longer than that spins for ever


class CannotError(Exception):
    """A peer has no kernel for the problem; the message says why."""


@dataclass(frozen=True)
class Bound:
    """A peer's kernel with all its operands.

    Attributes
    ----------
    run : callable
        One pass: a call with each copy of the operand.
    result : callable
        What the first copy gave in the last pass, as floats.
    weight : Array, optional
        The dequantised weight, ``[in_features, out_features]``, where the format cannot hold the problem's.
    """

    run: Callable[[], object]
    result: Callable[[], Array]
    weight: Array | None = None


Bind = Callable[[Array], Bound]


def number_of_copies(nbytes: int, low: int, high: int) -> int:
    """So many that together they take `low` bytes, without exceeding `high`."""
    if nbytes > high:
        raise CannotError(f"{nbytes / 1e6:.0f} MB do not fit into the cache")
    return min(max(1, -(-low // nbytes)), high // nbytes)


class Session:
    """Holds the operands between requests.

    Parameters
    ----------
    load : callable
        ``load(problem, copies)`` packs the operand and returns what binds activations or queries to it.
    bits_per_weight : callable, optional
        Of a matmul's format, scales included.
    """

    def __init__(
        self, load: Callable[[Any, int], Bind], bits_per_weight: Callable[[Matmul], float] | None = None
    ) -> None:
        self._load, self._bits_per_weight = load, bits_per_weight
        self._problem: Problem | None = None
        self._bind: Bind | None = None
        self._bound: Bound | None = None
        self._copies = 0
        self._pass_seconds = 0.0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "prepare" in request:
            return self._prepare(problem_from(request["prepare"]), *request["between"])
        if "bind" in request:
            return {"error": self._rebind(request["bind"])}
        return {"seconds": self._run(request["run"])}

    def _prepare(self, problem: Problem, low: int, high: int) -> dict[str, int]:
        self._bind = self._bound = None  # its memory is needed
        gc.collect()
        self._problem, nbytes = problem, self._nbytes(problem)
        self._copies = number_of_copies(nbytes, low, high)
        needed, available = 2 * self._copies * nbytes, _available_bytes()
        if needed > available:
            raise CannotError(f"needs {needed / 1e9:.1f} GB of memory while packing, {available / 1e9:.1f} are free")
        self._bind = self._load(problem, self._copies)
        return {"nbytes": nbytes, "copies": self._copies}

    def _nbytes(self, problem: Problem) -> int:
        if isinstance(problem, Attention):
            return problem.nbytes
        assert self._bits_per_weight is not None
        return int(problem.in_features * problem.out_features * self._bits_per_weight(problem) / 8)

    def _rebind(self, rows: int) -> float:
        assert self._problem is not None
        assert self._bind is not None
        self._bound = None
        self._bound = self._bind(self._problem.inputs(rows))
        self._bound.run()
        self._pass_seconds = 0.0
        return self._problem.error(rows, self._bound.result(), self._bound.weight)

    def _run(self, passes: int) -> float:
        assert self._bound is not None
        run = self._bound.run
        gc.disable()
        if self._pass_seconds < _LONG_PASS:
            run()  # wakes the threads, and brings back what other processes have driven out of the caches
        start = time.perf_counter()
        for _ in range(passes):
            run()
        seconds = time.perf_counter() - start
        gc.enable()
        self._pass_seconds = seconds / passes
        _settle()
        return self._pass_seconds / self._copies


def serve(
    description: str, load: Callable[[Any, int], Bind], bits_per_weight: Callable[[Matmul], float] | None = None
) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    session = Session(load, bits_per_weight)
    print(json.dumps({"description": description}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = session.answer(json.loads(line))
        except CannotError as error:
            answer = {"reason": str(error)}
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            answer = {"reason": f"{type(error).__name__}: {message[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


def _settle() -> None:
    """Wait for this process's threads to sleep: some spin for long after a job, into the next peer's time."""
    end = time.perf_counter() + _SETTLED_AFTER
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(_LOOK)
        if time.process_time() - used < _LOOK / 10:
            break


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
