"""nvcc compiles every kernel for every architecture; what they take of a multiprocessor is as the table says."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import cuda_build
import cuda_check

NVCC = cuda_build.find_nvcc()

pytestmark = [pytest.mark.nvcc, pytest.mark.skipif(NVCC is None, reason="no nvcc here")]


@pytest.mark.parametrize("architecture", cuda_check.ARCHITECTURES)
@pytest.mark.parametrize("source", cuda_check.sources(), ids=lambda path: path.stem)
def test_resources(source: Path, architecture: str) -> None:
    assert NVCC is not None
    table = json.loads(cuda_check.TABLE.read_text())
    for kernel, resources in cuda_check.measure(NVCC, architecture, source).items():
        assert resources.spilled_bytes == 0, kernel
        if cuda_check.version(NVCC) == table["nvcc"]:  # others allot registers in their own way
            assert asdict(resources) == table["kernels"][kernel][architecture]
