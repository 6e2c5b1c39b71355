"""Every case of the table: against the float64 reference, through opcheck, under torch.compile, per instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from teco_kernels.ops import _library
from teco_kernels.testing import Case, all_cases, run_case
from teco_kernels.testing.case import map_tensors

CASES = list(all_cases())
# opcheck and compilation look at schemas and shapes, not at numbers: the small cases of each operator are enough.
SMALL = [case for case in CASES if not case.benchmark]


def by_name(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_matches_reference(case: Case) -> None:
    result = run_case(case)
    assert result.ok, f"errors {result.errors} exceed {case.max_error}"


@pytest.mark.parametrize("case", SMALL, ids=by_name)
def test_schema_is_truthful(case: Case) -> None:
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    _library.record_calls(lambda operator, args: calls.append((operator, args)))
    try:
        case.function(**case.inputs())
    finally:
        _library.record_calls(None)
    assert calls
    for operator, args in calls:
        # torch has no arithmetic on fp8 tensors, with which two of opcheck's tests compare results.
        fp8 = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float8_e4m3fn for arg in args)
        utils = ("test_autograd_registration", "test_faketensor") if fp8 else "ALL"
        torch.library.opcheck(operator, args, test_utils=utils)


@pytest.mark.parametrize("case", SMALL, ids=by_name)
def test_compiles_without_graph_break(case: Case) -> None:
    torch.compiler.reset()
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager", dynamic=False)
    inputs = case.inputs()
    eager, traced = case.outputs(case.function, inputs), case.outputs(compiled, inputs)
    for name, expected in eager.items():
        assert torch.equal(traced[name], expected), name


@pytest.mark.parametrize("operator", dict.fromkeys(case.operator for case in SMALL))
def test_calls_stay_on_the_device_of_their_tensors(operator: str) -> None:
    """Of a GPU that is not there: no call makes a tensor elsewhere, or looks at values."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    gpu = torch.device("cuda:0")
    for case in SMALL:
        if case.operator != operator:
            continue
        inputs = map_tensors(case.inputs(), lambda tensor: FakeTensor(mode, tensor.to("meta"), gpu))
        with mode:
            result = case.function(**inputs)
        returned = () if result is None else result if isinstance(result, tuple) else (result,)
        assert all(tensor.device == gpu for tensor in returned), case.name


@pytest.mark.skipif("TECO_CPU_ISA" in os.environ, reason="already running under a forced instruction set")
@pytest.mark.parametrize("isa", _library.cpu_isa_choices()[1:])
def test_lower_instruction_set(isa: str) -> None:
    files = [__file__, str(Path(__file__).with_name("test_vector_layer.py"))]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            *files,
            "-k",
            "not schema and not compiles and not instruction_set",
        ],
        env=os.environ | {"TECO_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
