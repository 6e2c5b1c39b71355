"""The CUDA kernels run on the CPU: every case of the table, within the contract, without a finding."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch
from emulated_cuda import SEEDS, emulation

import teco_kernels as tk
from teco_kernels.ops import _library, gptq
from teco_kernels.ops.support import operators
from teco_kernels.testing import TOLERANCE, Case, all_cases, run_case
from teco_kernels.testing.cases.matmul import random_checkpoint

OPERATORS = (
    "embedding",
    "rms_norm",
    "fused_add_rms_norm",
    "silu_and_mul",
    "rotary_embedding",
    "dense_matmul",
    "sparse24_matmul",
    "gptq_matmul",
    "reshape_and_cache",
    "copy_blocks",
    "swap_blocks",
    "paged_attention",
    "merge_attention_states",
    "sample",
    "verify_recycled",
    "verify_recycled_sampled",
    "lm_head_argmax",
    "recycle_project",
    "all_reduce",
    "all_reduce_rms_norm",
    "all_gather",
    "reduce_scatter",
    "broadcast",
)


def is_on_tensor_cores(case: Case) -> bool:
    rows, exact = case.params.get("rows", 0), case.params.get("activation") == "exact"
    return 16 < rows < 100 and exact and case.dtype != torch.float32 and case.operator == "gptq_matmul"


# An emulated thread takes tens of nanoseconds for an access: the large cases would take minutes.
CASES = [
    case
    for case in all_cases()
    if case.operator in OPERATORS and case.bytes_moved < 1e6 and (case.flops < 8e6 or is_on_tensor_cores(case))
]


def test_supported_operators() -> None:
    assert not tk.supports("rms_norm", backend="cuda", device="cpu", dtype=torch.float32)
    with emulation():
        supported = [op for op in operators() if tk.supports(op, backend="cuda", device="cpu", dtype=torch.float32)]
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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_stand_alone(dtype: torch.dtype) -> None:
    """A row's bits do not depend on the other rows, nor on where they lie in memory."""
    x, weight = torch.randn(9, 1100).to(dtype), torch.randn(1100).to(dtype)
    shifted = torch.empty(9, 1101, dtype=dtype)[:, 1:]
    with emulation():
        normed, gated = tk.rms_norm(x, weight, 1e-6), tk.silu_and_mul(x)
        assert torch.equal(tk.rms_norm(shifted.copy_(x), weight, 1e-6), normed)
        assert torch.equal(tk.silu_and_mul(shifted), gated)
        for row in (0, 8):
            assert torch.equal(tk.rms_norm(x[row : row + 1], weight, 1e-6)[0], normed[row])
            assert torch.equal(tk.silu_and_mul(x[row : row + 1])[0], gated[row])


@pytest.mark.parametrize("activation", ["exact", "int8"])
def test_gptq_rows_stand_alone(activation: gptq.Activation) -> None:
    checkpoint = random_checkpoint(160, 40, 32, 4, torch.Generator().manual_seed(0))
    weight, x = tk.GPTQWeight.from_checkpoint(**checkpoint), torch.randn(11, 160)
    with emulation():
        out = tk.gptq_matmul(x, weight, activation=activation)
        for row in (0, 10):
            assert torch.equal(tk.gptq_matmul(x[row : row + 1], weight, activation=activation)[0], out[row])


def test_sequences_stand_alone() -> None:
    """Attention of a sequence: the same bits in any company, whatever its blocks are."""
    generator = torch.Generator().manual_seed(1)
    lengths = [700, 3, 40, 257]
    table = torch.randperm(80, generator=generator).view(4, 20).int()[:, : -(-700 // 48)]
    keys, values, query = (torch.randn(shape, generator=generator) for shape in [(80, 48, 2, 64)] * 2 + [(4, 6, 64)])
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    with emulation():
        out = tk.paged_attention(query, keys, values, table, seq_lens)
        for s in range(4):
            row = slice(s, s + 1)
            alone = tk.paged_attention(query[row], keys, values, table[row], seq_lens[row])
            assert torch.equal(alone[0], out[s])


def test_unseen_keys_may_be_nan() -> None:
    """A key and value that one row of a tile sees, and another does not, spoil nothing but the row that sees them."""
    query, keys, values = torch.randn(3, 2, 64), torch.randn(3, 16, 1, 64), torch.randn(3, 16, 1, 64)
    table, seq_lens = torch.tensor([[2, 0, 1]], dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    keys[1, 6], values[1, 6] = torch.nan, torch.nan  # position 38, that of the second row
    with emulation():
        out = tk.paged_attention(
            query, keys, values, table, seq_lens, torch.tensor([0, 3], dtype=torch.int32), sliding_window=1
        )
    assert torch.equal(out.isnan().any(-1).any(-1), torch.tensor([False, True, False]))


def test_in_place() -> None:
    """Outputs that are inputs: no thread writes what another still reads."""
    x, residual, weight = torch.randn(3, 600), torch.randn(3, 600), torch.randn(600)
    lse_a, lse_b, out_a, out_b = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3, 64), torch.randn(5, 3, 64)
    with emulation():
        expected = (
            *tk.fused_add_rms_norm(x, residual, weight, 1e-6),
            *tk.merge_attention_states(out_a, lse_a, out_b, lse_b),
        )
        results = (
            *tk.fused_add_rms_norm(x, residual, weight, 1e-6, out=(x, residual)),
            *tk.merge_attention_states(out_a, lse_a, out_b, lse_b, out=(out_a, lse_a)),
        )
    for result, tensor in zip(results, expected, strict=True):
        assert torch.equal(result, tensor)


def test_findings_are_errors() -> None:
    x, other = torch.randn(4, 64), torch.randn(8)
    with emulation() as simt:
        _library.record_calls(lambda *call: simt.simt_forget())
        tk.silu_and_mul(x)
        _library.record_calls(lambda *call: simt.simt_allow(other.data_ptr(), 32, 4, True, b"other"))
        with pytest.raises(
            RuntimeError, match=r"simt: kernel silu_and_mul, .*out of bounds(.|\n)*silu_and_mul\.cu:\d+"
        ):
            tk.silu_and_mul(x)


def test_embedding_of_a_part_of_the_vocabulary() -> None:
    """Tokens of other parts get zeros."""
    token_ids = torch.tensor([99, 100, 119, 120, -1])
    checkpoint = random_checkpoint(96, 64, 32, 4, torch.Generator().manual_seed(0))
    packed, dense = tk.GPTQWeight.from_checkpoint(**checkpoint), torch.randn(20, 37)
    for weight in (dense, packed):
        expected = tk.embedding(token_ids, weight, first_token=100)
        with emulation():
            assert torch.equal(tk.embedding(token_ids, weight, first_token=100), expected)
