"""The vector layer: conversions are exact for every bit pattern, exp holds its stated error over its whole range."""

from __future__ import annotations

import pytest
import torch

import teco_kernels as tk


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_round_like_torch(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    weight = torch.ones(256, dtype=dtype)
    shuffled = every.flatten()[torch.randperm(every.numel(), generator=torch.Generator().manual_seed(0))]
    for residual in (torch.zeros_like(every), shuffled.reshape(256, 256)):
        expected = (every.float() + residual.float()).to(dtype)
        _, summed = tk.fused_add_rms_norm(every, residual, weight, 1e-6)
        assert torch.equal(summed.isnan(), expected.isnan())
        assert torch.equal(summed[~summed.isnan()], expected[~expected.isnan()])


def test_exp_over_its_whole_range() -> None:
    gate = torch.linspace(-104, 104, 200_000)
    x = torch.stack((gate, torch.ones_like(gate)), dim=-1).t().contiguous().view(1, -1)
    out = tk.silu_and_mul(x)[0].double()
    expected = gate.double() * torch.sigmoid(gate.double())
    # Below -87.3 exp(-x) overflows to infinity and silu is 0; the true value is then below the normal range.
    normal = expected.abs() > 1.2e-36
    assert ((out - expected)[normal].abs() / expected[normal].abs()).max() < 5e-7
    assert out[~normal].abs().max() < 1.2e-36


def test_infinities_and_nan() -> None:
    x = torch.tensor([[float("inf"), -1000.0, float("nan"), 0.0] * 4 + [1.0] * 16])
    out = tk.silu_and_mul(x)[0, :4]
    assert out[0] == float("inf")
    assert out[1] == 0
    assert out[2].isnan()
    assert out[3] == 0
