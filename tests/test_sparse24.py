"""2:4 sparse matmul: packing, the bits of dense_matmul, invariance, special values, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teco_kernels.ops import DenseWeight, Sparse24Weight, dense_matmul, sparse24_matmul
from teco_kernels.testing import TOLERANCE
from teco_kernels.testing.cases.matmul import random_sparse24


def sparse_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random_sparse24(out_features, in_features, torch.Generator().manual_seed(1), dtype)


def test_layout() -> None:
    """Every value and place where the attributes say they are."""
    weight = sparse_weight(20, 40)
    packed = Sparse24Weight.from_dense(weight)
    assert packed.values.shape == (2, 10, 2, 16)
    assert packed.indices.shape == (2, 2, 16)
    for output in range(20):
        panel, column = divmod(output, 16)
        for group in range(10):
            word, place = divmod(group, 8)
            bits = packed.indices[panel, word, column].item() >> 4 * place
            inputs = [4 * group + (bits & 3), 4 * group + (bits >> 2 & 3)]
            assert inputs == weight[output, 4 * group : 4 * group + 4].nonzero().flatten().add(4 * group).tolist()
            assert torch.equal(packed.values[panel, group, :, column], weight[output, inputs])


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(0, 40), outputs=st.integers(0, 40), rows=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_any_shape_and_any_number_of_zeros(groups: int, outputs: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random_sparse24(outputs, 4 * groups, generator)
    weight *= torch.rand(weight.shape, generator=generator) < 0.7
    packed = Sparse24Weight.from_dense(weight)
    assert torch.equal(packed.dequantize(), weight.t())
    x = torch.randn(rows, 4 * groups, generator=generator)
    assert torch.equal(sparse24_matmul(x, packed), dense_matmul(x, DenseWeight.from_tensor(weight)))


@pytest.mark.parametrize("weight_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_same_bits_as_dense_and_for_any_batch(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    weight, bias = sparse_weight(200, 668, weight_dtype), torch.randn(200)
    packed, dense = Sparse24Weight.from_dense(weight, bias), DenseWeight.from_tensor(weight, bias)
    x = torch.randn(40, 668).to(dtype)
    whole = sparse24_matmul(x, packed)
    assert torch.equal(whole, dense_matmul(x, dense))
    for rows in range(1, 40):
        assert torch.equal(sparse24_matmul(x[:rows], packed), whole[:rows]), rows
        assert torch.equal(sparse24_matmul(x[rows:], packed), whole[rows:]), rows


def test_thread_count_does_not_change_bits() -> None:
    weight = Sparse24Weight.from_dense(sparse_weight(1056, 512))
    before = torch.get_num_threads()
    try:
        for rows in (1, 2, 20):
            x, results = torch.randn(rows, 512), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(sparse24_matmul(x, weight))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pruned_inputs_are_skipped(bad: float, rows: int) -> None:
    weight = sparse_weight(72, 192)
    packed, x = Sparse24Weight.from_dense(weight), torch.randn(rows, 192)
    clean = sparse24_matmul(x, packed)
    x[0, 100] = bad
    out = sparse24_matmul(x, packed)
    touched = weight[:, 100] != 0
    assert not out[0, touched].isfinite().any()
    assert torch.equal(out[0, ~touched], clean[0, ~touched])
    assert torch.equal(out[1:], clean[1:])


def test_zeros_that_fill_a_group_are_multiplied() -> None:
    """The limit that the docstring states."""
    weight = torch.zeros(16, 4)
    weight[0, 0] = 1
    out = sparse24_matmul(torch.tensor([[1, torch.inf, 0, torch.inf]]), Sparse24Weight.from_dense(weight))
    assert out.isnan().all()


def test_nothing_is_read_past_a_row() -> None:
    """12 inputs fill no block of 32, and the row's neighbour in memory is NaN."""
    weight = sparse_weight(19, 12)
    wide = torch.full((5, 14), float("nan"))
    wide[:, :12] = torch.randn(5, 12)
    out = sparse24_matmul(wide[:, :12], Sparse24Weight.from_dense(weight))
    assert torch.equal(out, dense_matmul(wide[:, :12].contiguous(), DenseWeight.from_tensor(weight)))


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 17 / 32), (torch.float16, 9 / 16)], ids=str)
def test_bytes(dtype: torch.dtype, share: float) -> None:
    weight = sparse_weight(64, 256, dtype)
    assert Sparse24Weight.from_dense(weight).nbytes == share * DenseWeight.from_tensor(weight).nbytes


def test_what_is_refused() -> None:
    weight = sparse_weight(32, 64)
    packed, x = Sparse24Weight.from_dense(weight), torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"weight: expected shape \[out_features, in_features\], got \[64\]"):
        Sparse24Weight.from_dense(weight[0])
    with pytest.raises(ValueError, match="weight: expected in_features to be a multiple of 4, got 62"):
        Sparse24Weight.from_dense(weight[:, :62])
    with pytest.raises(ValueError, match=r"bias: expected shape \[32\], got \[5\]"):
        Sparse24Weight.from_dense(weight, torch.zeros(5))
    weight[3, 8:11] = 1
    weight[3, 11] = 0
    with pytest.raises(
        ValueError,
        match="weight: expected at most 2 weights other than 0 in every 4 inputs, got 3 at output 3, inputs 8 to 11",
    ):
        Sparse24Weight.from_dense(weight)
    with pytest.raises(
        ValueError, match="sparse24_matmul: x: expected 64 input features in the last dimension, got 32"
    ):
        sparse24_matmul(x[:, :32], packed)
    with pytest.raises(TypeError, match="x: expected dtype float32, float16, bfloat16, got int64"):
        sparse24_matmul(x.long(), packed)
    with pytest.raises(ValueError, match="out: expected 2 x 32 elements, got 2 x 31"):
        sparse24_matmul(x, packed, out=torch.empty(2, 31))
    square = Sparse24Weight.from_dense(sparse_weight(64, 64))
    with pytest.raises(ValueError, match="out: expected memory apart from that of x"):
        sparse24_matmul(x, square, out=x)


def test_contradictory_tensors_are_refused() -> None:
    packed, x, out = Sparse24Weight.from_dense(sparse_weight(32, 64)), torch.randn(2, 64), torch.empty(2, 32)
    call = torch.ops.teco_kernels.sparse24_matmul.default
    with pytest.raises(RuntimeError, match="in_features: expected a multiple of 4, got 62"):
        call(out, x, packed.values, packed.indices, None, 62, 32)
    with pytest.raises(RuntimeError, match="values: expected shape"):
        call(out, x, packed.values[:, 1:], packed.indices, None, 64, 32)
    with pytest.raises(RuntimeError, match="indices: expected shape"):
        call(out, x, packed.values, packed.indices[:, :1], None, 64, 32)
    with pytest.raises(RuntimeError, match="indices: expected dtype int32"):
        call(out, x, packed.values, packed.indices.long(), None, 64, 32)
    # Whatever stands in the indices, nothing outside of a group is read.
    garbage = torch.full_like(packed.indices, -1)
    call(out, x, packed.values, garbage, None, 64, 32)
    assert out.isfinite().all()
