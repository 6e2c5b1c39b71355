"""The CUDA kernels run on the CPU: every case of the table, within the contract, without a finding."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch

import teco_kernels as tk
from emulated_cuda import SEEDS, emulation
from teco_kernels.ops.support import operators
from teco_kernels.testing import TOLERANCE, Case, all_cases, run_case

OPERATORS = (
    "embedding",
    "rms_norm",
    "fused_add_rms_norm",
    "silu_and_mul",
    "rotary_embedding",
    "gptq_matmul",
    "reshape_and_cache",
    "copy_blocks",
    "swap_blocks",
    "paged_attention",
    "merge_attention_states",
)
# An emulated thread takes tens of nanoseconds for an access: the large cases would take minutes.
CASES = [case for case in all_cases() if case.operator in OPERATORS and case.bytes_moved < 1 << 20]


def test_supported_operators() -> None:
    assert not tk.supports("rms_norm", backend="cuda", device="cpu", dtype=torch.float32)
    with emulation():
        supported = [
            op for op in operators() if tk.supports(op, backend="cuda", device="cpu", dtype=torch.float32)
        ]
    assert sorted(supported) == sorted(OPERATORS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case: Case) -> None:
    with emulation(seed=SEEDS[crc32(case.name.encode()) % len(SEEDS)]):
        result = run_case(case)
    assert result.ok, f"errors {result.errors} exceed {case.max_error}"


@pytest.mark.stress
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_order_of_threads_changes_no_bit(case: Case, seed: int) -> None:
    inputs = case.inputs()
    with emulation():
        expected = case.outputs(case.function, inputs)
    with emulation(seed=seed):
        outputs = case.outputs(case.function, inputs)
    for name, tensor in expected.items():
        assert torch.equal(outputs[name].nan_to_num(7), tensor.nan_to_num(7)), name
