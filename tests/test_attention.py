"""Paged attention: bit for bit the same over batch, chunking, threads and layout; what is skipped; what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import teco_kernels as tk
from teco_kernels.ops._reference import relative_error
from teco_kernels.ops.attention import paged_attention_reference
from teco_kernels.ops.cache import ELEMENT_MAX
from teco_kernels.testing import TOLERANCE

CACHE_DTYPES = (*TOLERANCE, *ELEMENT_MAX)
HEADS, KV_HEADS, BLOCK = 6, 2, 16
# Whatever acts on scores, each with masks on both ends of the keys.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 70},
    "everything": {
        "soft_cap": 3.0,
        "alibi_slopes": torch.linspace(0.1, 1, HEADS),
        "sinks": torch.linspace(-1, 1, HEADS),
        "sliding_window": 300,
        "scale": 0.3,
    },
}


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Sequences:
    """Keys, values and queries of whole sequences in one paged cache, to be attended to in any portions."""

    def __init__(
        self,
        lengths: list[int],
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        D: int = 64,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        counts = [-(-length // BLOCK) for length in lengths]
        num_blocks = sum(counts)
        order = torch.randperm(num_blocks, generator=generator).int()
        self.lengths = lengths
        self.table = torch.full((len(lengths), max(counts)), -7, dtype=torch.int32)
        for s, count in enumerate(counts):
            self.table[s, :count], order = order[:count], order[count:]
        self.queries = [torch.randn(length, HEADS, D, generator=generator).to(dtype) for length in lengths]
        shape = (num_blocks, BLOCK, KV_HEADS, D)
        cache_dtype = cache_dtype or dtype
        step = 40 if cache_dtype == torch.int8 else 1
        self.caches = [(torch.randn(shape, generator=generator) * step).to(cache_dtype) for _ in range(2)]
        self.scales: dict[str, Tensor] = {}
        if cache_dtype in ELEMENT_MAX:
            self.scales = {
                name: torch.rand(shape[:3], generator=generator) / step for name in ("key_scale", "value_scale")
            }

    def attend(self, *portions: tuple[int, int, int], **options: Any) -> list[tuple[Tensor, Tensor]]:
        """Output and lse of the query tokens [begin, end) of each portion (sequence, begin, end), in one call."""
        sizes = [end - begin for _, begin, end in portions]
        out, lse = tk.paged_attention(
            torch.cat([self.queries[s][begin:end] for s, begin, end in portions]),
            *self.caches,
            self.table[[s for s, _, _ in portions]],
            torch.tensor([end for _, _, end in portions], dtype=torch.int32),
            None if set(sizes) == {1} else torch.tensor([0, *sizes]).cumsum(0).int(),
            return_lse=True,
            **self.scales,
            **options,
        )
        return list(zip(out.split(sizes), lse.split(sizes), strict=True))


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rows: slice = slice(None)) -> None:
    assert torch.equal(actual[0], expected[0][rows])
    assert torch.equal(actual[1], expected[1][rows])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_prefill_chunks_verification_and_decode_agree(cache_dtype: torch.dtype, options: dict[str, Any]) -> None:
    sequences = Sequences([530], cache_dtype=cache_dtype)
    [whole] = sequences.attend((0, 0, 530), **options)
    for begin, end in ((0, 100), (100, 300), (300, 301), (301, 527), (522, 530), (525, 528), (528, 530)):
        [part] = sequences.attend((0, begin, end), **options)
        assert_same(part, whole, slice(begin, end))
    for position in (0, 1, 7, 8, 63, 64, 65, 255, 256, 257, 511, 512, 529):
        [token] = sequences.attend((0, position, position + 1), **options)
        assert_same(token, whole, slice(position, position + 1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 20])
def test_company_and_threads_change_no_bit(dtype: torch.dtype, head_dim: int, threads: Any) -> None:
    sequences = Sequences([1300, 90, 1, 260], dtype, D=head_dim)
    portions = [(0, 1299, 1300), (1, 20, 90), (2, 0, 1), (3, 255, 260), (1, 89, 90), (0, 700, 1100)]
    expected = [sequences.attend(portion)[0] for portion in portions]
    for count in (1, 2, 5):
        threads(count)
        together = sequences.attend(*portions)
        for portion, alone, part in zip(portions, expected, together, strict=True):
            assert_same(part, alone)
            assert_same(sequences.attend(portion)[0], alone)
    decode = sequences.attend(*[(s, length - 1, length) for s, length in enumerate(sequences.lengths)])
    assert_same(decode[0], expected[0])
    assert_same(decode[1], expected[4])


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
def test_block_size_and_layout_change_no_bit(cache_dtype: torch.dtype) -> None:
    sequences = Sequences([300, 77], cache_dtype=cache_dtype)
    portions = [(0, 250, 300), (1, 76, 77)]
    expected = sequences.attend(*portions)
    # Every block in halves.
    halves = torch.stack([2 * sequences.table, 2 * sequences.table + 1], dim=-1).flatten(1)
    whole, sequences.table = sequences.table, halves
    caches, scales = sequences.caches, sequences.scales
    sequences.caches = [cache.view(-1, BLOCK // 2, *cache.shape[2:]) for cache in caches]
    sequences.scales = {name: scale.view(-1, BLOCK // 2, KV_HEADS) for name, scale in scales.items()}
    for part, alone in zip(sequences.attend(*portions), expected, strict=True):
        assert_same(part, alone)
    # Heads outside the slots, keys and values in one tensor.
    sequences.table = whole
    both = torch.stack(caches, dim=1).transpose(2, 3).contiguous()
    sequences.caches = [both[:, i].transpose(1, 2) for i in range(2)]
    sequences.scales = {n: scale.permute(2, 0, 1).contiguous().permute(1, 2, 0) for n, scale in scales.items()}
    for part, alone in zip(sequences.attend(*portions), expected, strict=True):
        assert_same(part, alone)


@pytest.mark.parametrize(("cache_dtype", "tolerance"), [(torch.int8, 1e-2), (torch.float8_e4m3fn, 4e-2)], ids=str)
def test_a_quantised_cache_costs_little_accuracy(cache_dtype: torch.dtype, tolerance: float) -> None:
    sequences = Sequences([500])
    arguments = (sequences.table, torch.tensor([500], dtype=torch.int32))
    query = sequences.queries[0][499:]
    expected = paged_attention_reference(query, *sequences.caches, *arguments)
    caches = [torch.zeros_like(cache, dtype=cache_dtype) for cache in sequences.caches]
    scales = {name: torch.zeros(caches[0].shape[:3]) for name in ("key_scale", "value_scale")}
    keys, values = (cache.flatten(0, 1) for cache in sequences.caches)
    tk.reshape_and_cache(keys, values, *caches, torch.arange(len(keys)), **scales)
    assert relative_error(tk.paged_attention(query, *caches, *arguments, **scales), expected) < tolerance


def test_keys_that_a_row_must_not_see_may_be_nan() -> None:
    sequences = Sequences([200])
    [clean] = sequences.attend((0, 0, 200), sliding_window=50)
    for begin, end in ((0, 200), (100, 101), (98, 103)):
        for position in (0, 99, 103, 150):
            block, slot = int(sequences.table[0, position // BLOCK]), position % BLOCK
            kept = [cache[block, slot].clone() for cache in sequences.caches]
            for cache in sequences.caches:
                cache[block, slot] = torch.nan
            [(out, _)] = sequences.attend((0, begin, end), sliding_window=50)
            for cache, values in zip(sequences.caches, kept, strict=True):
                cache[block, slot] = values
            own = torch.arange(begin, end)
            sees = (own >= position) & (own - position < 50)
            assert out[sees].isnan().all()
            assert torch.equal(out[~sees], clean[0][begin:end][~sees])


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_beyond_all_keys_is_no_window(causal: bool) -> None:
    sequences = Sequences([200])
    [expected] = sequences.attend((0, 100, 200), causal=causal)
    for window in (200, 2**31, sys.maxsize):
        [actual] = sequences.attend((0, 100, 200), causal=causal, sliding_window=window)
        assert_same(actual, expected)


def test_blocks_that_are_not_read_may_be_anything() -> None:
    sequences = Sequences([200])
    [expected] = sequences.attend((0, 199, 200), sliding_window=20)
    sequences.table[0, : (200 - 20) // BLOCK] = 10**6
    [actual] = sequences.attend((0, 199, 200), sliding_window=20)
    assert_same(actual, expected)


@pytest.mark.parametrize("split", [1, 64, 300])
def test_merging_two_sets_of_keys_is_attention_over_both(split: int) -> None:
    sequences = Sequences([512])
    query = sequences.queries[0][:3]

    def attend(first: int, last: int) -> tuple[Tensor, Tensor]:
        caches = [cache[sequences.table[0].long()].flatten(0, 1)[first:last].unsqueeze(0) for cache in sequences.caches]
        table, length = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([last - first], dtype=torch.int32)
        start = torch.tensor([0, 3], dtype=torch.int32)
        return tk.paged_attention(query, *caches, table, length, start, causal=False, return_lse=True)

    a, b, whole = attend(0, split), attend(split, 512), attend(0, 512)
    merged = tk.merge_attention_states(*a, *b)
    assert relative_error(merged[0], whole[0]) < 1e-6
    assert relative_error(merged[1], whole[1]) < 1e-6
    assert_same(tk.merge_attention_states(*b, *a), merged)
    empty = torch.full_like(a[0], torch.nan), torch.full_like(a[1], -torch.inf)
    assert_same(tk.merge_attention_states(*a, *empty), a)
    out, lse = tk.merge_attention_states(*empty, *empty)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_large_scores_do_not_overflow() -> None:
    sequences = Sequences([300])
    inputs = (*sequences.caches, sequences.table, torch.tensor([300], dtype=torch.int32))
    for factor in (1e3, 1e18):
        query = sequences.queries[0][299:] * factor
        assert relative_error(tk.paged_attention(query, *inputs), paged_attention_reference(query, *inputs)) < 1e-4


def test_out_is_written_where_it_lies() -> None:
    sequences = Sequences([40])
    merged = torch.full((40, 2 * HEADS, 100), 5.0)
    out = merged[:, HEADS:, :64]
    starts, length = torch.tensor([0, 40], dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    expected = tk.paged_attention(sequences.queries[0], *sequences.caches, sequences.table, length, starts)
    returned = tk.paged_attention(sequences.queries[0], *sequences.caches, sequences.table, length, starts, out=out)
    assert returned is out
    assert torch.equal(out, expected)
    assert (merged[:, :HEADS] == 5).all()
    assert (merged[:, :, 64:] == 5).all()


def call(**changes: Any) -> dict[str, Any]:
    """Arguments for two sequences of 3 and 2 query tokens over 20 and 5 keys; 4 blocks."""
    return {
        "query": torch.randn(5, HEADS, 16),
        "key_cache": torch.randn(4, BLOCK, KV_HEADS, 16),
        "value_cache": torch.randn(4, BLOCK, KV_HEADS, 16),
        "block_table": torch.tensor([[0, 1], [2, 99]], dtype=torch.int32),
        "seq_lens": torch.tensor([20, 5], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 3, 5], dtype=torch.int32),
    } | changes


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_table": int32([0, 4], [2, 0])}, r"block_table: expected block ids from 0 to 3, got 4 at \[0, 1\]"),
        ({"block_table": int32([0, 1], [-1, 0])}, r"block_table: .* got -1 at \[1, 0\]"),
        ({"block_table": int32([0, 1])}, r"block_table: expected shape \[S, max_blocks\] with S = 2"),
        ({"seq_lens": int32(33, 5)}, r"seq_lens: expected 0 to max_blocks \* B = 32, got 33 at index 0"),
        ({"seq_lens": int32(20, -1)}, r"seq_lens: expected 0 to .*, got -1 at index 1"),
        ({"seq_lens": int32(20, 1)}, r"seq_lens: expected at least the 2 query tokens .*, got 1 at index 1"),
        ({"query_start_loc": int32(0, 3, 4)}, r"query_start_loc: expected T = 5 \(from query\) at the end, got 4"),
        ({"query_start_loc": int32(1, 3, 5)}, r"query_start_loc: expected 0 at index 0, got 1"),
        ({"query_start_loc": int32(0, 6, 5)}, r"query_start_loc: .* got 6 and then 5 at index 2"),
        ({"query_start_loc": int32(0, 5)}, r"query_start_loc: expected shape \[S \+ 1\] with S \+ 1 = 3"),
        ({"query_start_loc": None}, r"seq_lens: expected one sequence for each of T = 5"),
        ({"query": torch.randn(5, 5, 16)}, r"query: expected Hq to be a multiple of Hkv = 2 .*, got 5"),
        ({"query": torch.randn(5, 16, HEADS).mT}, r"query: expected stride 1 in the last dimension"),
        ({"query": torch.randn(5, HEADS, 8)}, r"key_cache: .* D = 8 \(from query\)"),
        (
            {
                "query": torch.randn(5, HEADS, 513),
                "key_cache": (wide := torch.randn(4, BLOCK, 2, 513)),
                "value_cache": wide,
            },
            r"query: expected D from 1 to 512, got 513",
        ),
        ({"key_cache": torch.randn(4, BLOCK, 16, KV_HEADS).mT}, r"key_cache: expected stride 1"),
        ({"value_cache": torch.randn(4, BLOCK, 1, 16)}, r"value_cache: .* Hkv = 2 \(from key_cache\)"),
        ({"out": torch.empty(4, HEADS, 16)}, r"out: expected shape .* T = 5"),
        ({"out": torch.full((16,), 5.0).expand(5, HEADS, 16)}, r"out: expected memory of its own .* in dimension 0"),
        ({"sinks": torch.zeros(2)}, r"sinks: expected shape \[Hq\] with Hq = 6"),
        ({"alibi_slopes": torch.zeros(2)}, r"alibi_slopes: expected shape \[Hq\]"),
        ({"sliding_window": 0}, r"sliding_window: expected a number >= 1 or None, got 0"),
        ({"soft_cap": -1.0}, r"soft_cap: expected a number > 0 or None, got -1.0"),
        ({"soft_cap": 1e-39}, r"soft_cap: expected 0 or a normal number of fp32 > 0, got 1e-39"),
        ({"soft_cap": 1e-50}, r"soft_cap: expected 0 or a normal number of fp32 > 0, got 1e-50"),
        ({"scale": float("nan")}, r"scale: expected a finite number of fp32, got nan"),
        ({"scale": 1e39}, r"scale: expected a finite number of fp32, got 1e\+39"),
        ({"key_scale": 1.0}, r"key_scale: expected None, as key_cache is float32"),
        ({"seq_lens": int32(20, 5).to("meta")}, r"expected all tensors on one device|devices"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_named_and_nothing_is_written(changes: dict[str, Any], message: str) -> None:
    out = torch.full((5, HEADS, 16), 5.0)
    with pytest.raises(ValueError, match=message):
        tk.paged_attention(**call(**({"out": out} | changes)))
    assert (out == 5).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query": torch.zeros(5, HEADS, 16, dtype=torch.float64)},
            r"query: expected dtype float32, float16, bfloat16",
        ),
        ({"value_cache": torch.randn(4, BLOCK, KV_HEADS, 16).half()}, r"value_cache: expected the dtype of key_cache"),
        ({"seq_lens": torch.tensor([20, 5])}, r"seq_lens: expected dtype int32, got int64"),
        ({"block_table": torch.tensor([[0, 1], [2, 3]])}, r"block_table: expected dtype int32, got int64"),
        ({"out": torch.empty(5, HEADS, 16).half()}, r"out: expected the dtype of query \(float32\), got float16"),
        ({"sinks": torch.zeros(HEADS).half()}, r"sinks: expected dtype float32, got float16"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_dtypes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tk.paged_attention(**call(**changes))


def test_bad_states_are_named() -> None:
    out, lse = torch.randn(5, HEADS, 16), torch.randn(5, HEADS)
    with pytest.raises(ValueError, match=r"lse_b: expected shape \[T, Hq\] with T = 5 \(from out_a\), got \[4, 6\]"):
        tk.merge_attention_states(out, lse, out, lse[:4])
    with pytest.raises(TypeError, match=r"out_b: expected the dtype of out_a \(float32\), got float16"):
        tk.merge_attention_states(out, lse, out.half(), lse)
    with pytest.raises(TypeError, match=r"lse_a: expected dtype float32, got float64"):
        tk.merge_attention_states(out, lse.double(), out, lse)


def test_prefix_may_be_shorter_than_the_query_without_positions() -> None:
    arguments = call(seq_lens=int32(20, 1), causal=False)
    assert relative_error(tk.paged_attention(**arguments), paged_attention_reference(**arguments)) < 1e-6
