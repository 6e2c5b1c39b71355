"""Times the cases that are worth it, from cold caches, and holds each against the machine's ceilings."""

from __future__ import annotations

import copy
import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from teco_kernels.testing.case import Case
from teco_kernels.testing.ceilings import Ceilings, Prober
from teco_kernels.testing.machine import available_bytes, facts, l3_bytes

_COLD = 4  # times the cache that the rotating inputs fill
_MAX_COPIES = 512
_MEMORY = 2 << 30
_MIN_SAMPLES, _MAX_SAMPLES = 5, 2000
_WARM_UP = 2
_STEADY = 0.01  # of the median: standard error at which more samples would tell nothing


@dataclass(frozen=True)
class Timing:
    """How long one case takes.

    Attributes
    ----------
    case : Case
    seconds, quartile_low, quartile_high, best : float
        Median, quartiles and minimum over the samples.
    samples : int
    copies : int
        Sets of inputs and outputs that took turns.
    cold : bool
        Whether these exceed the last-level cache, so that a set was no longer there when its turn came.
    """

    case: Case
    seconds: float
    quartile_low: float
    quartile_high: float
    best: float
    samples: int
    copies: int
    cold: bool

    @property
    def bandwidth(self) -> float:
        """Bytes per second, of those that must move."""
        return self.case.bytes_moved / self.seconds

    @property
    def rate(self) -> float:
        """Arithmetic operations per second."""
        return self.case.flops / self.seconds

    def bound(self, ceilings: Ceilings) -> str:
        """What limits the case on this machine: "memory" or "arithmetic"."""
        memory = self.case.bytes_moved / ceilings.read_bandwidth
        return "memory" if memory >= self.case.flops / ceilings.peak(self.case.arithmetic) else "arithmetic"

    def share(self, ceilings: Ceilings) -> float:
        """Shortest possible time by the ceilings over the time taken: 1 is the roofline."""
        case = self.case
        return ceilings.shortest_time(case.bytes_moved, case.flops, case.arithmetic) / self.seconds


def time_case(case: Case, seconds: float = 1.0) -> Timing:
    """Time one case for about so many seconds, less when the median is steady before."""
    calls, cold = _calls(case)
    for index in range(max(_WARM_UP, len(calls))):  # all of them: memory is given at the first touch
        calls[index % len(calls)]()
    samples: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(samples) < _MAX_SAMPLES:
            call = calls[len(samples) % len(calls)]
            start = time.perf_counter()
            call()
            now = time.perf_counter()
            samples.append(now - start)
            if len(samples) >= _MIN_SAMPLES and (now >= end or (len(samples) % 32 == 0 and _is_steady(samples))):
                break
    finally:
        if collecting:
            gc.enable()
    low, median, high = _quartiles(samples)
    return Timing(case, median, low, high, min(samples), len(samples), len(calls), cold)


def bench(cases: Iterable[Case], *, seconds: float = 1.0) -> Iterator[tuple[Timing, Ceilings]]:
    """Time cases one by one, each for about so many seconds.

    The ceilings are measured anew between cases and the best is kept, so that both sides of a ratio come from the same
    minutes of a machine whose speed drifts.

    Yields
    ------
    Timing, Ceilings
        The case just timed, and the ceilings as known by then.
    """
    prober = Prober()
    ceilings = prober.measure(min(seconds, 0.5))
    for case in cases:
        timing = time_case(case, seconds)
        ceilings |= prober.measure(min(seconds, 0.5) / 5)
        yield timing, ceilings


def report(timings: list[Timing], ceilings: Ceilings) -> dict[str, Any]:
    """All results and what they were measured on, for a JSON file."""
    return {
        "machine": facts(),
        "ceilings": {
            "read_bytes_per_second": ceilings.read_bandwidth,
            "fp32_operations_per_second": ceilings.fp32,
            "int8_operations_per_second": ceilings.int8,
        },
        "cases": [
            {
                "name": timing.case.name,
                "operator": timing.case.operator,
                "dtype": str(timing.case.dtype).removeprefix("torch."),
                "params": dict(timing.case.params),
                "arithmetic": timing.case.arithmetic,
                "bytes": timing.case.bytes_moved,
                "operations": timing.case.flops,
                "seconds": timing.seconds,
                "quartiles": [timing.quartile_low, timing.quartile_high],
                "best": timing.best,
                "samples": timing.samples,
                "copies": timing.copies,
                "cold": timing.cold,
                "bound": timing.bound(ceilings),
                "share_of_ceiling": timing.share(ceilings),
            }
            for timing in timings
        ],
    }


def _quartiles(samples: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def _is_steady(samples: list[float]) -> bool:
    """Whether the standard error of the median, by the quartiles, is small against it."""
    low, median, high = _quartiles(samples)
    return (high - low) / len(samples) ** 0.5 < _STEADY * median


def _calls(case: Case) -> tuple[list[Callable[[], Any]], bool]:
    """The call over inputs and outputs of its own, so often that together they exceed the cache; whether they do."""
    first = case.inputs()
    first |= _outputs(case, first)
    size = _nbytes(first)
    wanted = -(-_COLD * l3_bytes() // max(size, 1))
    fitting = min(_MEMORY, available_bytes() // 2) // max(size, 1)
    copies = max(1, min(wanted, fitting, _MAX_COPIES))
    sets = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
    return [partial(case.function, **inputs) for inputs in sets], copies * size > 2 * l3_bytes()


def _outputs(case: Case, inputs: dict[str, Any]) -> dict[str, Any]:
    """`out=` for functions that take it: an allocation per call would be timed with its page faults."""
    out = inspect.signature(case.function).parameters.get("out")
    if out is None or "out" in inputs:
        return {}
    result = case.function(**copy.deepcopy(inputs))
    takes_all = str(out.annotation).startswith("tuple")
    return {"out": result[0] if isinstance(result, tuple) and not takes_all else result}


def _nbytes(value: Any) -> int:
    """Bytes of the tensors in inputs: arguments, sequences of them, weight objects."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_nbytes, value))
    return sum(map(_nbytes, vars(value).values())) if hasattr(value, "__dict__") else 0
