"""Bad arguments: one clear error that names the argument, what was expected and what came."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import teco_kernels as tk


def test_shape_dtype_stride_and_device_are_named() -> None:
    x, weight = torch.randn(2, 64), torch.ones(64)
    with pytest.raises(ValueError, match=r"rms_norm: weight: expected shape \[hidden_size\] with hidden_size = 64"):
        tk.rms_norm(x, torch.ones(63), 1e-5)
    with pytest.raises(TypeError, match=r"weight: expected the dtype of input \(float32\), got float16"):
        tk.rms_norm(x, weight.half(), 1e-5)
    with pytest.raises(TypeError, match=r"input: expected dtype float32, float16, bfloat16, got int64"):
        tk.rms_norm(x.long(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"input: expected stride 1 in the last dimension, got stride 64"):
        tk.rms_norm(torch.randn(64, 64).t(), weight, 1e-5)
    with pytest.raises(ValueError, match="expected all tensors on one device"):
        tk.rms_norm(x, weight.to("meta"), 1e-5)
    with pytest.raises(ValueError, match="input: expected an even last dimension"):
        tk.silu_and_mul(torch.randn(2, 7))


def test_unknown_instruction_set_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import teco_kernels"],
        env=os.environ | {"TECO_CPU_ISA": "avx9000"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "TECO_CPU_ISA: expected one of" in run.stderr
