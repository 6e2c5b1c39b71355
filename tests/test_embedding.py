"""Embedding from packed weights: the bits of the dequantised matrix, replayed steps, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import teco_kernels as tk
from teco_kernels.ops import GPTQWeight, Plan
from teco_kernels.ops.packing import BITS
from teco_kernels.testing.cases.matmul import random_checkpoint, random_minima

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def packed(bits: int, group_size: int = 64, *, minimum: bool = False, **options: Any) -> GPTQWeight:
    """An embedding of 224 rows, whose last panel is full, by 192; with a bias of the head."""
    generator = torch.Generator().manual_seed(bits)
    tensors = (random_minima if minimum else random_checkpoint)(192, 224, group_size, bits, generator, **options)
    make = GPTQWeight.from_codes if minimum else GPTQWeight.from_checkpoint
    return make(**tensors, bias=torch.randn(224, generator=generator))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("group_size", [24, 32, 192])
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_the_dequantised_columns(bits: int, group_size: int, minimum: bool, dtype: torch.dtype) -> None:
    """All rows, rounded once; groups of 24 fill no block."""
    weight, ids = packed(bits, group_size, minimum=minimum), torch.arange(223, -1, -1)
    assert torch.equal(tk.embedding(ids, weight, dtype=dtype), weight.dequantize().t()[ids].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_inputs_of_groups_from_all_over(bits: int, dtype: torch.dtype) -> None:
    weight, ids = packed(bits, act_order=True), torch.arange(224)
    assert weight.input_order is not None
    assert torch.equal(tk.embedding(ids, weight, dtype=dtype), weight.dequantize().t().to(dtype))


def test_a_last_panel_that_is_not_full_and_rows_with_a_stride() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (64, 19), generator=generator, dtype=torch.uint8)
    zeros = torch.full((2, 19), 128)
    weight = GPTQWeight.from_codes(codes, torch.rand(2, 19, generator=generator), bits=8, zeros=zeros)
    ids, wide = torch.tensor([18, 0, 18, 16]), torch.full((4, 100), 7.0)
    out = tk.embedding(ids, weight, out=wide[:, 20:84])
    assert out.data_ptr() == wide[:, 20:].data_ptr()
    assert torch.equal(out, weight.dequantize().t()[ids])
    assert (wide[:, :20] == 7).all()
    assert (wide[:, 84:] == 7).all()


def test_is_recorded_and_may_be_of_any_number_of_threads() -> None:
    weight, ids = packed(8), torch.zeros(500, dtype=torch.int64)
    out, threads = torch.empty(500, 192), torch.get_num_threads()
    plan = Plan(lambda: tk.embedding(ids, weight, out=out), keep_alive=(ids, weight, out))
    ids.random_(224, generator=torch.Generator().manual_seed(0))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out.zero_()
            plan.replay()
            assert torch.equal(out, weight.dequantize().t()[ids])
    finally:
        torch.set_num_threads(threads)


def test_what_is_refused_is_named() -> None:
    weight = packed(8)
    for token in (-1, 224):
        with pytest.raises(ValueError, match=rf"^embedding: token_ids: expected 0 to 223 .* got {token} at index 1"):
            tk.embedding(torch.tensor([0, token]), weight)
    with pytest.raises(ValueError, match=r"embedding: out: expected shape \[T, hidden_size\] with hidden_size = 192"):
        tk.embedding(torch.tensor([0]), weight, out=torch.empty(1, 191))
    with pytest.raises(TypeError, match="embedding: out: expected dtype float32, float16, bfloat16, got float64"):
        tk.embedding(torch.tensor([0]), weight, dtype=torch.float64)
    with pytest.raises(TypeError, match="embedding: token_ids: expected dtype int64, got int32"):
        tk.embedding(torch.tensor([0], dtype=torch.int32), weight)
    with pytest.raises(ValueError, match=r"embedding: out: expected memory apart from that of weight"):
        tk.embedding(torch.tensor([0]), weight, out=weight.packed.view(-1).view(torch.float32)[:192].view(1, 192))
