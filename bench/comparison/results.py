"""What was measured, and what follows from it: medians, spreads, rates, shares of the machine's limits."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from problems import Attention, problem_from

from comparison.plan import Problem, Residence


@dataclass(frozen=True)
class Limits:
    """What the machine gives to the threads in use, at its best during the run.

    Attributes
    ----------
    memory, cache : float
        Bytes read per second from memory, and again and again from half of the last-level cache.
    fp32, int8 : float
        Operations per second, a multiply-add counting as two.
    """

    memory: float
    cache: float
    fp32: float
    int8: float

    def __or__(self, other: Limits) -> Limits:
        """The higher of two measurements, each."""
        return Limits(*map(max, asdict(self).values(), asdict(other).values()))


@dataclass
class Result:
    """One kernel on one problem with one number of rows.

    Attributes
    ----------
    peer : str
    problem : Matmul or Attention
    residence : {"memory", "L3", "once"}
    rows : int
    nbytes, copies : int
        Bytes of one copy of the weights (of all keys and values), and how many took turns.
    error : float, optional
        Relative, against float64.
    seconds : list of float
        Per call, one number per round.
    reason : str, optional
        Why nothing was measured.
    """

    peer: str
    problem: Problem
    residence: Residence
    rows: int
    nbytes: int = 0
    copies: int = 0
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    reason: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the rounds lie between them; a single round is both."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def arithmetic(self) -> str:
        """The kind of multiply-adds that our kernels do."""
        return "int8" if "int8" in self.peer else "fp32"

    @property
    def rate(self) -> float:
        """Operations per second."""
        return operations(self.problem, self.rows) / self.median

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        fields["problem"] = {"kind": self.problem.kind, **asdict(self.problem)}
        return fields | ({"median": self.median, "quartiles": self.quartiles} if self.seconds else {})

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Result:
        """Inverse of `as_json`."""
        known = {name: value for name, value in fields.items() if name not in ("median", "quartiles")}
        return cls(**known | {"problem": problem_from(fields["problem"])})


def operations(problem: Problem, rows: int) -> int:
    """Arithmetic operations of one call, a multiply-add counting as two; masked scores do not count."""
    if isinstance(problem, Attention):
        seen = sum(range(problem.context - rows + 1, problem.context + 1))
        return 4 * problem.batch * problem.heads * problem.head_dim * seen
    return 2 * rows * problem.in_features * problem.out_features


def shortest_time(result: Result, limits: Limits, arithmetic: str) -> float:
    """Seconds of one call when memory (or the cache) and arithmetic both are at the machine's limits."""
    problem, rows = result.problem, result.rows
    if isinstance(problem, Attention):
        moved = 2 * problem.batch * rows * problem.heads * problem.head_dim * (4 if problem.dtype == "float32" else 2)
    else:
        moved = rows * (problem.in_features + problem.out_features) * 4
    bandwidth = limits.cache if result.residence == "L3" else limits.memory
    peak = limits.int8 if arithmetic == "int8" else limits.fp32
    return max((result.nbytes + moved) / bandwidth, operations(problem, rows) / peak)
