"""The numerics contract, bit for bit: a token's result does not depend on the batch or on the number of threads."""

from __future__ import annotations

import pytest
import torch

import teco_kernels as tk
from teco_kernels.testing import TOLERANCE


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm_and_activation_rows_stand_alone(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(67, 1100).to(dtype), torch.randn(67, 1100).to(dtype), torch.randn(1100).to(dtype)
    normed, new_residual = tk.fused_add_rms_norm(x, residual, weight, 1e-6)
    gated = tk.silu_and_mul(x)
    for row in (0, 1, 66):
        alone = tk.fused_add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, 1e-6)
        assert torch.equal(alone[0][0], normed[row])
        assert torch.equal(alone[1][0], new_residual[row])
        assert torch.equal(tk.silu_and_mul(x[row : row + 1])[0], gated[row])


def test_thread_count_does_not_change_bits() -> None:
    x = torch.randn(300, 2048)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(tk.silu_and_mul(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm_of_heads_in_a_wider_matrix(dtype: torch.dtype) -> None:
    qkv, weight = torch.randn(5, 7 * 24).to(dtype), torch.randn(24).to(dtype)
    heads = qkv.unflatten(-1, (7, 24))[:, 2:5]
    expected = tk.rms_norm(heads.contiguous(), weight, 1e-6)
    before = qkv.clone()
    assert torch.equal(tk.rms_norm(heads, weight, 1e-6), expected)
    assert torch.equal(tk.rms_norm(heads.contiguous(), weight, 1e-6, out=heads), expected)
    assert torch.equal(heads, expected)
    assert torch.equal(qkv[:, : 2 * 24], before[:, : 2 * 24])
    assert torch.equal(qkv[:, 5 * 24 :], before[:, 5 * 24 :])
    heads.copy_(before.unflatten(-1, (7, 24))[:, 2:5])
    assert torch.equal(tk.rms_norm(heads, weight, 1e-6, out=heads), expected)


def test_norm_of_heads_refuses_overlap() -> None:
    qkv = torch.randn(5, 7 * 24).unflatten(-1, (7, 24))
    with pytest.raises(ValueError, match="out: expected memory apart from that of input"):
        tk.rms_norm(qkv[:, 2:5], torch.ones(24), 1e-6, out=qkv[:, 1:4])
    with pytest.raises(ValueError, match="out: expected the 15 x 24 elements of input"):
        tk.rms_norm(qkv[:, 2:5], torch.ones(24), 1e-6, out=torch.empty(3, 10, 24)[:, :5])
