"""Holds every operator against its float64 reference and sums up what came out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from teco_kernels.testing.case import Case, CaseResult, run_case
from teco_kernels.testing.machine import facts, instruction_sets

#: Devices whose kernels a build can have; `verify` runs on those that this one has.
DEVICES = ("cpu",)


def verify(cases: Iterable[Case]) -> Iterator[CaseResult]:
    """Run cases one by one; a call that raises is a failed case, not the end."""
    for case in cases:
        try:
            yield run_case(case)
        except Exception as error:
            yield CaseResult(case, exception=f"{type(error).__name__}: {error}")


def report(results: list[CaseResult], device: str) -> dict[str, Any]:
    """All results and what they were computed on, for a JSON file."""
    return {
        "machine": facts(),
        "instruction_sets": instruction_sets(),
        "device": device,
        "passed": sum(result.ok for result in results),
        "failed": sum(not result.ok for result in results),
        "cases": [
            {
                "name": result.case.name,
                "operator": result.case.operator,
                "dtype": str(result.case.dtype).removeprefix("torch."),
                "params": dict(result.case.params),
                "ok": result.ok,
                "max_error": result.case.max_error,
                # JSON has no infinity: it stands for NaN, infinity or another value in the wrong place.
                "errors": {name: error if math.isfinite(error) else None for name, error in result.errors.items()},
                "exception": result.exception,
            }
            for result in results
        ],
    }
