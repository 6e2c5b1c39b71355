"""CUDA kernels, emulated: what the case table does not show of matmuls, the recycle head, sampling and verification."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_size_t, c_uint, c_void_p
from functools import partial
from typing import Any

import pytest
import test_recycle_kernels as recycle
import test_sampling as sampling
import test_verify as verify
import torch
from emulated_cuda import emulation

import cuda_check
import teco_kernels as tk
from teco_kernels.ops import Plan
from teco_kernels.ops.recycle import lm_head_argmax_reference
from teco_kernels.testing import TOLERANCE
from teco_kernels.testing.cases.matmul import random_sparse24

TESTS: dict[str, Callable[[], None]] = {
    **{
        f"NaN, {kind}": partial(recycle.test_nan_is_named_and_other_rows_are_right, kind) for kind in ("plain", "8-bit")
    },
    "infinities": recycle.test_logsumexp_of_infinities_and_nan,
    "plan": recycle.test_a_plan_replays_the_whole_head,
    "extreme logits": sampling.test_extreme_logits_and_temperatures,
    "bad row": partial(sampling.test_a_bad_row_is_named_and_the_others_are_kept, torch.nan, 1.0),
    "bad row, greedy": partial(sampling.test_a_bad_row_is_named_and_the_others_are_kept, torch.inf, 0.0),
    "no row": partial(sampling.test_a_bad_row_is_named_and_the_others_are_kept, -torch.inf, 1.0),
    "rejection rule": verify.test_edges_of_the_rule,
    "rejection by rounding": verify.test_a_rejection_that_is_only_rounding_draws_from_the_target,
    "no probability": partial(verify.test_what_is_no_probability_is_named, "recycled", 1.5),
    "no probability, target": partial(verify.test_what_is_no_probability_is_named, "target", 1.5),
    "zeros": verify.test_a_row_of_zeros_to_draw_from_is_refused,
}


@pytest.mark.parametrize("name", TESTS)
def test_as_on_the_cpu(name: str) -> None:
    with emulation(seed=2):
        TESTS[name]()


def test_sample_draws_the_cpu_s_token() -> None:
    """To the last bit of every weight: many draws, from logits with ties and masks, under all filters."""
    generator, rows = torch.Generator().manual_seed(0), 30
    logits = (4 * torch.randn(rows, 200, generator=generator)).bfloat16()
    logits[:, 3::5] = -torch.inf
    options: dict[str, Any] = {
        "temperature": 0.3 + 2 * torch.rand(rows, generator=generator),
        "top_k": torch.randint(0, 90, (rows,), generator=generator) * (torch.arange(rows) % 2),
        "top_p": 1 - (torch.arange(rows) % 3) * torch.rand(rows, generator=generator) / 3,
        "min_p": torch.rand(rows, generator=generator) ** 6 * (torch.arange(rows) % 5 == 0),
        "seed": torch.randint(2**62, (rows,), generator=generator),
        "offset": torch.randint(2**62, (rows,), generator=generator),
    }
    options["min_p"][7::7] = 1.0  # the largest logit and its equals
    expected = tk.sample(logits, **options)
    with emulation(seed=3):
        assert torch.equal(tk.sample(logits, **options), expected)


def test_the_largest_finite_logit_is_one() -> None:
    logits = torch.tensor([[0.0, torch.finfo(torch.float32).max]])
    with emulation():
        assert tk.sample(logits, seed=0, offset=0).tolist() == [1]


def test_a_plan_may_verify_what_is_no_token() -> None:
    """Ids that a step before has left as -1, or out of range, are rejected; nothing behind the rows is read."""
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(2, 2, 40, generator=generator).softmax(-1)
    recycled, token_ids = target[:, :1].clone(), torch.tensor([[3], [5]])
    seed, offset = torch.tensor([7, 8]), torch.zeros(2, dtype=torch.int64)
    accepted, next_ids = torch.empty(2, dtype=torch.int32), torch.empty(2, dtype=torch.int64)

    def calls() -> None:
        tk.verify_recycled_sampled(target, recycled, token_ids, seed=seed, offset=offset, out=(accepted, next_ids))

    results = []
    for backend in (nullcontext, partial(emulation, seed=1)):
        with backend():
            token_ids.copy_(torch.tensor([[3], [5]]))
            plan = Plan(calls, keep_alive=(target, recycled, token_ids, seed, offset, accepted, next_ids))
            assert accepted.tolist() == [1, 1]
            token_ids.copy_(torch.tensor([[-1], [40]]))
            plan.replay()
            assert accepted.tolist() == [0, 0]
            results.append(next_ids.tolist())
    assert results[0] == results[1]


def test_lowest_id_wins_ties() -> None:
    """In one panel, in neighbouring ones, and in those of other threads of the merge."""
    hidden = torch.ones(2, 8)
    for size, first, second in ((40, 3, 5), (40, 15, 16), (5000, 17, 4800)):
        weight = torch.zeros(size, 8)
        weight[[first, second]] = 1
        with emulation(seed=1):
            token_ids, logit = tk.lm_head_argmax(hidden, tk.DenseWeight.from_tensor(weight))
        assert token_ids.tolist() == [first] * 2
        assert logit.tolist() == [8] * 2


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("groups_per_section", [1, 2, 4])
def test_parts_of_sections_make_the_whole(bits: int, groups_per_section: int) -> None:
    """Ranks that have whole sections, the last one ragged, give together the bits of one that has them all."""
    generator = torch.Generator().manual_seed(bits)
    groups, out_features, rows, section_size = 19, 40, 9, 32 * groups_per_section
    tensors: dict[str, Any] = {
        "codes": torch.randint(0, 2**bits, (groups * 32, out_features), generator=generator, dtype=torch.uint8),
        "scales": torch.rand(groups, out_features, generator=generator).half(),
        "zeros": torch.randint(0, 2**bits + 1, (groups, out_features), generator=generator),
    }
    bias, x = torch.randn(out_features, generator=generator), torch.randn(rows, groups * 32, generator=generator)

    def product(first: int, last: int, bias: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """Of the groups from `first` to before `last`."""
        part = {name: tensor[first:last] for name, tensor in tensors.items() if name != "codes"}
        inputs = slice(32 * first, 32 * last)
        weight = tk.GPTQWeight.from_codes(codes=tensors["codes"][inputs], **part, bits=bits, bias=bias)
        return tk.gptq_matmul(x[:, inputs], weight, activation="int8", **options)

    def exact(first: int, last: int, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty(rows, out_features, dtype=torch.float64)
        return product(first, last, bias, section_size=section_size, out=out)

    border = 2 * groups_per_section
    expected = product(0, groups, bias).double()
    with emulation(seed=2):
        whole = exact(0, groups, bias)
        assert torch.equal(exact(0, border, bias) + exact(border, groups, None), whole)
        assert torch.equal(product(0, groups, bias, section_size=section_size), whole.float())
    assert ((whole - expected).abs().amax() / expected.abs().amax()) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("in_features", [37, 160])
def test_weights_as_they_are(in_features: int, dtype: torch.dtype) -> None:
    """Not packed: aligned rows and others, few rows and many, also a slice of a wider matrix."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(72, in_features + 8, generator=generator).to(dtype)
    for weight in (wide[:, 8:], wide[:, 3 : in_features + 3], wide[:, :in_features].contiguous()):
        for rows in (1, 9, 33):
            hidden = torch.randn(rows, in_features, generator=generator).to(dtype)
            logsumexp, expected_sum = torch.empty(rows), torch.empty(rows)
            with emulation(seed=rows):
                token_ids, logit = tk.lm_head_argmax(hidden, weight, logsumexp=logsumexp)
            expected = lm_head_argmax_reference(hidden, weight, logsumexp=expected_sum)
            assert torch.equal(token_ids, expected[0])
            torch.testing.assert_close(logit.double(), expected[1].double(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logsumexp, expected_sum, rtol=1e-5, atol=1e-5)


def test_rows_stand_alone() -> None:
    """A row's bits do not depend on the others, up to 16 of them and beyond."""
    generator = torch.Generator().manual_seed(2)
    values, bias = random_sparse24(40, 1100, generator), torch.randn(40, generator=generator)
    for dtype, counts in ((torch.float32, (1, 5, 33)), (torch.float16, (1, 9, 16)), (torch.bfloat16, (17, 40))):
        dense = tk.DenseWeight.from_tensor(values.to(dtype), bias)
        sparse = tk.Sparse24Weight.from_dense(values.to(dtype), bias)
        x = torch.randn(counts[-1], 1100, generator=generator).to(dtype)
        with emulation():
            products, pruned = tk.dense_matmul(x, dense), tk.sparse24_matmul(x, sparse)
            for count in counts:
                assert torch.equal(tk.dense_matmul(x[-count:], dense), products[-count:])
                assert torch.equal(tk.sparse24_matmul(x[-count:], sparse), pruned[-count:])


def test_unaligned_tensors() -> None:
    """Weights and inputs that no access of 16 bytes can read give the same bits."""
    generator = torch.Generator().manual_seed(3)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return buffer[1:].view(tensor.shape).copy_(tensor)

    for rows in (3, 20):
        x = torch.randn(rows, 64, generator=generator).half()
        dense = tk.DenseWeight.from_tensor(torch.randn(24, 64, generator=generator).half())
        sparse = tk.Sparse24Weight.from_dense(random_sparse24(24, 64, generator).half())
        other_dense = tk.DenseWeight(moved(dense.packed), None, 24)
        other_sparse = tk.Sparse24Weight(moved(sparse.values), moved(sparse.indices), None, 64, 24)
        with emulation(seed=1):
            assert torch.equal(tk.dense_matmul(moved(x), other_dense), tk.dense_matmul(x, dense))
            assert torch.equal(tk.sparse24_matmul(moved(x), other_sparse), tk.sparse24_matmul(x, sparse))


def test_a_weight_without_inputs() -> None:
    """On tensor cores too, whose pipeline begins before its loop."""
    weight = torch.empty(1, 0, 320, dtype=torch.uint8)
    out = torch.full((17, 16), torch.nan, dtype=torch.float16)
    with emulation():
        torch.ops.teco_kernels.gptq_matmul(
            out, torch.empty(17, 0, dtype=torch.float16), weight, None, None, 0, 16, 4, False, False, 0
        )
    assert torch.equal(out, torch.zeros(17, 16, dtype=torch.float16))


def test_a_weight_that_is_not_aligned() -> None:
    weight = torch.zeros(321, dtype=torch.uint8)[1:].view(1, 1, 320)
    arguments = torch.zeros(1, 16), torch.zeros(1, 32), weight, None, None, 32, 16, 4, False, False, 0
    torch.ops.teco_kernels.gptq_matmul(*arguments)  # the CPU takes it
    with emulation(), pytest.raises(RuntimeError, match="weight: expected memory aligned to 16 bytes"):
        torch.ops.teco_kernels.gptq_matmul(*arguments)


class Launch(Structure):
    """`simt::Launch`."""

    _fields_ = [
        ("kernel", c_char_p),
        ("blocks", c_uint * 3),
        ("threads", c_uint * 3),
        ("dynamic_shared_bytes", c_size_t),
    ]


@contextmanager
def launches_looked_at() -> Iterator[list[Launch]]:
    """Launches within it, none of which is run."""
    launches = []

    @CFUNCTYPE(c_void_p, POINTER(Launch))
    def look(launch: Any) -> None:
        launches.append(Launch.from_buffer_copy(launch.contents))

    with emulation() as simt:
        simt.simt_intercept(look)
        try:
            yield launches
        finally:
            simt.simt_intercept(None)


def test_launches_of_very_many_rows() -> None:
    """The rows of a matmul are where a grid has no end to speak of."""
    rows = 8 * 65536
    weight = tk.GPTQWeight.from_codes(
        codes=torch.zeros(32, 16, dtype=torch.uint8), scales=torch.ones(1, 16), zeros=torch.zeros(1, 16).long(), bits=4
    )
    dense = torch.zeros(16, 32)
    x = torch.zeros(1, 32).expand(rows, 32)
    with launches_looked_at() as launches:
        tk.gptq_matmul(x, weight)
        tk.gptq_matmul(x, weight, activation="int8")
        tk.dense_matmul(x, tk.DenseWeight.from_tensor(dense))
        tk.dense_matmul(x.half(), tk.DenseWeight.from_tensor(dense.half()))
    assert [tuple(launch.blocks) for launch in launches] == [(rows // 8, 1, 1)] * 3 + [(rows // 64, 1, 1)]


def test_shared_memory_of_attention_is_what_the_tables_count() -> None:
    block_table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with launches_looked_at() as launches:
        for dim in cuda_check.ATTENTION_SHARED:
            cache = torch.zeros(1, 1, 1, dim)
            tk.paged_attention(torch.zeros(1, 1, dim), cache, cache, block_table, lengths)
    assert [launch.dynamic_shared_bytes for launch in launches] == list(cuda_check.ATTENTION_SHARED.values())


def test_more_attention_rows_than_kernels_count() -> None:
    """For each sequence, of however few tokens, there may be 16 rows per kv head."""
    heads, seqs = 2**15, 2**11 + 1
    query, cache = torch.zeros(1, heads, 1), torch.zeros(1, 1, heads, 1)
    start = torch.zeros(seqs + 1, dtype=torch.int32)
    start[-1] = 1
    lengths = torch.zeros(seqs, dtype=torch.int32)
    with emulation(), pytest.raises(ValueError, match=r"query: expected 2\^30 rows \(tokens times heads\) at the most"):
        tk.paged_attention(query, cache, cache, lengths.view(-1, 1), lengths, query_start_loc=start, scale=1.0)


def with_odd_stride(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy in which all strides but that of `dim` are multiples of 16 elements; -1: all are, from an odd place on."""
    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, -(-strides[0] * size // 16) * 16)
        strides[0] += tensor.dim() - len(strides) == dim
    offset = int(dim < 0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    buffer = torch.empty(offset + last + 1, dtype=tensor.dtype)
    return buffer.as_strided(tensor.shape, strides, offset).copy_(tensor)


def _normal(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _reshape_and_cache(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    tk.reshape_and_cache(key, value, keys, values, torch.tensor([5, 0, 9]))


def _rotary_embedding(interleaved: bool, query: torch.Tensor, key: torch.Tensor, cos_sin: torch.Tensor) -> None:
    tk.rotary_embedding(torch.tensor([2, 0, 1]), query, key, cos_sin, interleaved=interleaved)


def _paged_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    table, seq_lens = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32), torch.tensor([7, 5], dtype=torch.int32)
    tk.paged_attention(query, keys, values, table, seq_lens, out=out)


#: Calls, and their tensors.
VIEWS: dict[str, tuple[Callable[..., Any], list[torch.Tensor]]] = {
    "rms_norm": (
        lambda x, w, out: tk.rms_norm(x, w, 1e-6, out=out),
        [_normal(2, 3, 32), _normal(32), _normal(2, 3, 32)],
    ),
    "fused_add_rms_norm": (
        lambda x, residual, w, *out: tk.fused_add_rms_norm(x, residual, w, 1e-6, out=out),
        [_normal(3, 32), _normal(3, 32), _normal(32), _normal(3, 32), _normal(3, 32)],
    ),
    "silu_and_mul": (lambda x, out: tk.silu_and_mul(x, out=out), [_normal(3, 64), _normal(3, 32)]),
    "reshape_and_cache": (_reshape_and_cache, [*[_normal(3, 2, 32)] * 2, *[_normal(3, 4, 2, 32)] * 2]),
    **{
        f"rotary_embedding, {kind}": (
            partial(_rotary_embedding, kind == "interleaved"),
            [_normal(3, 4, 32), _normal(3, 2, 32), _normal(4, 32, dtype=torch.float32)],
        )
        for kind in ("halves", "interleaved")
    },
    "merge_attention_states": (
        lambda a, lse_a, b, lse_b, *out: tk.merge_attention_states(a, lse_a, b, lse_b, out=out),
        [*[_normal(3, 2, 32), _normal(3, 2, dtype=torch.float32)] * 3],
    ),
    "paged_attention": (
        _paged_attention,
        [_normal(2, 4, 32), _normal(4, 4, 2, 32), _normal(4, 4, 2, 32), _normal(2, 4, 32)],
    ),
    "embedding": (
        lambda w, out: tk.embedding(torch.tensor([1, 4]), w, out=out),
        [_normal(5, 32), _normal(2, 32)],
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_one_unaligned_stride(name: str) -> None:
    """Where a single stride or address keeps accesses of 16 bytes away, nothing else changes."""
    function, tensors = VIEWS[name]

    def results(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        with emulation(seed=1):
            function(*tensors)
        return tensors

    expected = results([tensor.clone() for tensor in tensors])
    for odd, tensor in enumerate(tensors):
        for dim in range(-1, tensor.dim() - 1):
            views = [with_odd_stride(other, dim if i == odd else other.dim()) for i, other in enumerate(tensors)]
            for result, of_aligned in zip(results(views), expected, strict=True):
                assert torch.equal(result, of_aligned), (odd, dim)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_what_an_8_bit_cache_makes_of_extremes(dtype: torch.dtype) -> None:
    """The largest number, infinity, NaN, zeros and what counts as zero are written as on the CPU."""
    largest = torch.finfo(torch.float32).max
    key = torch.randn(5, 1, 33)
    for token, x in enumerate((largest, torch.inf, torch.nan)):
        key[token, 0, 32 - token] = x
    key[3], key[4] = 0, 1e-31
    results = []
    for backend in (nullcontext, emulation):
        cache, scale = torch.zeros(5, 1, 1, 33, dtype=dtype), torch.ones(5, 1, 1)
        with backend():
            tk.reshape_and_cache(
                key, key, cache, cache.clone(), torch.arange(5), key_scale=scale, value_scale=1 * scale
            )
        results.append((scale, cache[[0, 3, 4]].float()))
    for on_cpu, emulated in zip(*results, strict=True):
        assert torch.equal(on_cpu.nan_to_num(-1), emulated.nan_to_num(-1))


def test_nan_of_an_fp8_cache() -> None:
    """Read as NaN, whichever of the two it is."""
    keys = torch.ones(1, 4, 1, 32).to(torch.float8_e4m3fn)
    values = keys.clone().view(torch.uint8)
    values[0, 1, 0, 3], values[0, 2, 0, 5] = 0x7F, 0xFF
    table, seq_lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    with emulation():
        out = tk.paged_attention(
            torch.ones(1, 1, 32), keys, values.view(keys.dtype), table, seq_lens, key_scale=1.0, value_scale=1.0
        )
    assert out.isnan().view(-1).nonzero().view(-1).tolist() == [3, 5]


def test_a_row_without_a_token_has_no_projection() -> None:
    """Of a step before, in a plan; the first and the last token are tokens."""
    embedding, projection, norm = torch.randn(20, 24), torch.randn(24, 48), torch.ones(24)
    hidden, token_ids, out = torch.randn(4, 24), torch.tensor([0, 5, 6, 19]), torch.empty(4, 24)

    def calls() -> None:
        tk.recycle_project(
            hidden,
            token_ids,
            embedding,
            hidden_norm=norm,
            embedding_norm=norm,
            projection=projection,
            eps=1e-5,
            out=out,
        )

    with emulation(seed=3):
        plan = Plan(calls, keep_alive=(embedding, projection, norm, hidden, token_ids, out))
        expected = out.clone()
        token_ids.copy_(torch.tensor([0, -1, 20, 19]))
        plan.replay()
    assert out[1:3].isnan().all()
    assert torch.equal(out[::3], expected[::3])


def test_a_long_sequence_of_many_rows() -> None:
    """Whose keys are not split, beside one whose are."""
    generator = torch.Generator().manual_seed(6)
    keys, values, query = (torch.randn(shape, generator=generator) for shape in [(20, 32, 1, 32)] * 2 + [(21, 1, 32)])
    table = torch.randperm(20, generator=generator).view(2, 10).int()
    arguments = query, keys, values, table, torch.tensor([300, 270]).int(), torch.tensor([0, 20, 21]).int()
    expected = tk.paged_attention(*arguments)
    with emulation(seed=2):
        torch.testing.assert_close(tk.paged_attention(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_nothing_to_copy() -> None:
    """Pairs of blocks without elements, and blocks without pairs."""
    for size, pairs in ((0, 1), (4, 0)):
        cache = torch.ones(3, 2, 1, size)
        with emulation():
            tk.copy_blocks(cache, cache.clone(), torch.tensor([[0, 1]] * pairs, dtype=torch.int64).view(-1, 2))
