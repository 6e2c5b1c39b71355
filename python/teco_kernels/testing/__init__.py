"""The case table: every case is both a conformance test and a benchmark."""

from __future__ import annotations

from teco_kernels.testing.case import TOLERANCE, Case, CaseResult, run_case
from teco_kernels.testing.cases import all_cases

__all__ = ["TOLERANCE", "Case", "CaseResult", "all_cases", "run_case"]
