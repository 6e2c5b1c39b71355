"""Triton's PTX for sm_80, interpreted: cases of the table within the contract; planted bugs are caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
from emulated_cuda import ROOT
from test_triton import _QUICK, CASES

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install -e '.[triton]')"
)

#: Cases of every run of the tests: products by tensor cores in fp16 and int8, and attention with its splits.
ALWAYS = (
    "dense_matmul-float16-rows=33-",
    "gptq_matmul-float16-rows=33-activation=exact-in_features=160-out_features=72-bits=4-group_size=32-act_order=True",
    "gptq_matmul-float16-rows=3-activation=exact-in_features=576-out_features=224-bits=3-group_size=64",
    "gptq_matmul-float16-rows=3-activation=int8-in_features=576-out_features=200-bits=4-group_size=64",
    "lm_head_argmax-float16-tokens=1-in_features=192-out_features=320-weight=gptq-bits=8-group_size=32-activation=exact",
    "paged_attention-float16-setup=decode-heads=(4, 2)-head_dim=64",
)


def lines_of(*arguments: str) -> list[dict[str, Any]]:
    """What a process of interpreted_triton.py prints: this one interprets Triton's Python, not its PTX."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "interpreted_triton.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(names: list[str], *options: str) -> None:
    """All of these cases are within the contract, without a finding."""
    results = lines_of(*options, *names)
    assert [result["case"] for result in results] == names
    wrong = [result for result in results if not result["ok"]]
    assert not wrong, json.dumps(wrong, indent=1)


@pytest.mark.parametrize("options", [[], ["--general"]])
def test_cases(options: list[str]) -> None:
    names = [next(case.name for case in CASES if case.name.startswith(start) and case.flops > 0) for start in ALWAYS]
    check(names, *options)


@pytest.mark.triton
@pytest.mark.parametrize("operator", sorted({case.operator for case in CASES}))
def test_all_kinds_of_kernels(operator: str) -> None:
    """The cases that the default run of test_triton.py interprets."""
    check([case.name for case in CASES if case.name in _QUICK and case.operator == operator])


def check_planted(call: str, most: int, unnoticed: dict[str, int]) -> None:
    """All bugs are noticed, but so many of each kind."""
    bugs = lines_of("--plant", call, str(most))
    for kind in ("dropped barrier", "a group too few is waited for", "another shift", "another half of the factors"):
        of_kind = [bug for bug in bugs if bug["bug"] == kind]
        assert of_kind, kind
        missed = [bug for bug in of_kind if bug["outcome"] == "unnoticed"]
        assert len(missed) <= unnoticed.get(kind, 0), missed


def test_planted_bugs() -> None:
    """Every barrier of the matmul, every wait, and wrong constants."""
    check_planted("dense_matmul, 40 rows", 4, {})


@pytest.mark.triton
def test_planted_bugs_of_attention() -> None:
    """What may go unnoticed: a shift that only a negative number or a third split would show, and the wait behind the
    loop, whose last step copies nothing. (Whatever touches bytes that are still to arrive is refused.)
    """
    check_planted("paged_attention, decode", 12, {"another shift": 2, "a group too few is waited for": 1})
