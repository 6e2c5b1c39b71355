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


def test_outputs_that_share_memory_are_refused() -> None:
    x, weight, square = torch.randn(8, 64), torch.ones(64), tk.DenseWeight.from_tensor(torch.randn(64, 64))
    expected = tk.dense_matmul(x, square)
    with pytest.raises(
        ValueError, match=r"rms_norm: out: expected memory of its own for every element, .* dimension 0"
    ):
        tk.rms_norm(x, weight, 1e-5, out=torch.empty(64).expand(8, 64))
    with pytest.raises(ValueError, match="dense_matmul: out: expected memory apart from that of x"):
        tk.dense_matmul(x, square, out=x)
    with pytest.raises(ValueError, match="dense_matmul: out: expected memory apart from that of x"):
        tk.dense_matmul(x[:1], square, out=x[:1])
    shifted = torch.randn(9, 64)
    with pytest.raises(ValueError, match="rms_norm: out: expected memory apart from that of input"):
        tk.rms_norm(shifted[:8], weight, 1e-5, out=shifted[1:])
    with pytest.raises(ValueError, match="fused_add_rms_norm: out: expected memory apart from that of residual_out"):
        tk.fused_add_rms_norm(x, x, weight, 1e-5, out=(shifted[1:], shifted[1:]))
    # Columns of one matrix are apart, and so are rows that take turns.
    columns, turns = torch.cat((x, x), dim=1), torch.stack((x, x), dim=1)
    assert torch.equal(tk.dense_matmul(columns[:, :64], square, out=columns[:, 64:]), expected)
    assert torch.equal(tk.dense_matmul(turns[:, 1], square, out=turns[:, 0]), expected)
    assert torch.equal(turns[:, 1], x)


def test_norms_and_activation_work_in_place() -> None:
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    expected = tk.rms_norm(x, weight, 1e-5)
    assert torch.equal(tk.rms_norm(in_place := x.clone(), weight, 1e-5, out=in_place), expected)
    normed, summed = tk.fused_add_rms_norm(x, residual, weight, 1e-5)
    pair = x.clone(), residual.clone()
    tk.fused_add_rms_norm(*pair, weight, 1e-5, out=pair)
    assert torch.equal(pair[0], normed)
    assert torch.equal(pair[1], summed)
    gated = tk.silu_and_mul(x)
    assert torch.equal(tk.silu_and_mul(x, out=x[:, :32]), gated)


def test_unknown_instruction_set_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import teco_kernels"],
        env=os.environ | {"TECO_CPU_ISA": "avx9000"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "TECO_CPU_ISA: expected one of" in run.stderr


def test_embedding_names_tokens_and_memory() -> None:
    weight = torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"embedding: token_ids: expected 0 to 7 .* got 8 at index 1"):
        tk.embedding(torch.tensor([0, 8]), weight)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match=r"embedding: out: expected memory apart from that of weight"):
            tk.embedding(torch.tensor([0]), weight, out=weight[2:3].view(dtype)[:, :4])
