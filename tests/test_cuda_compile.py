"""nvcc compiles every kernel for every architecture; what they take of a multiprocessor, and which instructions
they are made of, is as the tables say."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import cuda_build
import cuda_check
import cuda_sass

NVCC, CUOBJDUMP = cuda_build.find_nvcc(), cuda_sass.find_cuobjdump()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc here")

#: What every instance of a kernel has. Of what is meant and missing, docs/gpu.md tells.
MEANT = {
    "all_gather": {"LDG.128", "STG.128"},
    "all_reduce": {"LDG.128", "STG.128"},
    "all_reduce_rms_norm": {"LDG.128", "STG.128"},
    "broadcast": {"LDG.128", "STG.128"},
    "dense_matmul": {"LDG.128"},
    "dense_tensor_cores": {"HMMA", "LDG.128", "LDGSTS.128", "LDSM.4"},
    "gptq_tensor_cores": {"HMMA", "LDGSTS.128", "LDSM.4"},
    "merge_attention_states": {"LDG.128", "STG.128"},
    "paged_attention": {"LDS.128", "STS.128"},
    "reduce_scatter": {"LDG.128", "STG.128"},
    "rms_norm": {"LDG.128", "STG.128"},
    "rotary_embedding": {"LDG.128", "STG.128"},
    "silu_and_mul": {"LDG.128", "STG.128"},
    "sparse24_matmul": {"LDG.128"},
}


@pytest.mark.nvcc
@needs_nvcc
@pytest.mark.parametrize("architecture", cuda_check.ARCHITECTURES)
@pytest.mark.parametrize("source", cuda_check.sources(), ids=lambda path: path.stem)
def test_resources(source: Path, architecture: str) -> None:
    assert NVCC is not None
    table = json.loads(cuda_check.TABLE.read_text())
    measured = cuda_check.measure(NVCC, architecture, source)
    assert set(measured) == cuda_check.kernels_of(source)
    for kernel, resources in measured.items():
        assert resources.spilled_bytes == 0, kernel
        if cuda_build.version(NVCC) == table["nvcc"]:  # others allot registers in their own way
            assert asdict(resources) == table["kernels"][kernel][architecture]


@pytest.mark.nvcc
@needs_nvcc
@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump beside nvcc, in $PATH or in the package triton")
@pytest.mark.parametrize("architecture", cuda_sass.ARCHITECTURES)
@pytest.mark.parametrize("source", cuda_check.sources(), ids=lambda path: path.stem)
def test_instructions(source: Path, architecture: str) -> None:
    assert NVCC is not None
    assert CUOBJDUMP is not None
    table = json.loads(cuda_sass.TABLE.read_text())
    measured = cuda_sass.measure(NVCC, CUOBJDUMP, architecture, source)
    assert set(measured) == cuda_check.kernels_of(source)
    for kernel, counts in measured.items():
        if cuda_build.version(NVCC) == table["nvcc"]:
            assert counts == table["kernels"][kernel][architecture], kernel


@pytest.mark.parametrize("table", [cuda_check.TABLE, cuda_sass.TABLE], ids=lambda path: path.stem)
def test_tables_have_every_kernel(table: Path) -> None:
    kernels = json.loads(table.read_text())["kernels"]
    assert set(kernels) == set().union(*map(cuda_check.kernels_of, cuda_check.sources()))
    architectures = cuda_check.ARCHITECTURES if table == cuda_check.TABLE else cuda_sass.ARCHITECTURES
    assert all(tuple(numbers) == architectures for numbers in kernels.values())


def test_instructions_are_those_meant() -> None:
    """By the table."""
    table = json.loads(cuda_sass.TABLE.read_text())["kernels"]
    for kernel, instructions in MEANT.items():
        for architecture, counts in table[kernel].items():
            for instruction in instructions:
                assert counts.get(instruction) == counts["instances"], (kernel, architecture, instruction)
    for architecture, counts in table["gptq_matmul"].items():
        assert counts["IDP.4A"] == counts["instances"] * 2 // 3, architecture  # those of int8, in sections or not
    for architecture, counts in table["embedding"].items():  # but for fp32 weights, of whose rows 16 bytes become 8
        assert counts["STG.128"] == 7, architecture
