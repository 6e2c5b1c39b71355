"""Holds every operator against its float64 reference and sums up what came out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from teco_kernels.ops.support import supports
from teco_kernels.ops.triton_backend import use_triton
from teco_kernels.testing.case import Case, CaseResult, run_case
from teco_kernels.testing.machine import facts, instruction_sets


def check_device(device: str) -> None:
    """Raise ValueError for another device than "cpu" and "cuda", or where there is no GPU."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: this torch sees no GPU (torch.cuda.is_available() is false), got 'cuda'")


def verify(cases: Iterable[Case], *, device: str = "cpu", triton: bool = False) -> Iterator[CaseResult]:
    """Run cases one by one; a call that raises is a failed case, not the end.

    Parameters
    ----------
    cases : iterable of Case
        Which ones.
    device : {"cpu", "cuda"}
        Where the tensors are, and so whose kernels run. A case that has none is not run, and says why.
    triton : bool
        The Triton kernels in their place; on the CPU, in Triton's interpreter (`use_triton`).
    """
    check_device(device)
    backend = "triton" if triton else device
    if triton:
        use_triton("cuda" if device == "cuda" else "cpu")
    try:
        for case in cases:
            support = supports(case.operator, backend=backend, device=device, dtype=case.dtype, **case.params)
            if not support:
                yield CaseResult(case, unsupported=support.reason)
                continue
            try:
                yield run_case(case, device=device)
            except Exception as error:
                yield CaseResult(case, exception=f"{type(error).__name__}: {error}")
    finally:
        if triton:
            use_triton(None)


def report(results: list[CaseResult], device: str, triton: bool = False) -> dict[str, Any]:
    """All results and what they were computed on, for a JSON file."""
    return {
        "machine": facts(),
        "instruction_sets": instruction_sets(),
        "device": device,
        "triton": triton,
        "passed": sum(result.ok and not result.unsupported for result in results),
        "failed": sum(not result.ok for result in results),
        "unsupported": sum(bool(result.unsupported) for result in results),
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
                "unsupported": result.unsupported,
            }
            for result in results
        ],
    }
