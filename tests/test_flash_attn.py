"""flash-attn's functions: against a float64 reference of its own conventions, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from teco_kernels.integrations.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from teco_kernels.ops import kernel_calls
from teco_kernels.ops._reference import relative_error
from teco_kernels.testing import TOLERANCE

HEADS, KV_HEADS, D = 6, 2, 32
NO_WINDOW = (-1, -1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence, ``[length, heads, D]``; masks aligned to the bottom right corner, as flash-attn's."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    group = len(q) // len(k)
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * (softmax_scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    rows, columns = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
    if alibi_slopes is not None:
        scores -= alibi_slopes.double()[:, None, None] * (rows - columns).abs()
    left, right = window_size
    hidden = torch.zeros_like(rows - columns, dtype=torch.bool)
    if causal:
        right = 0
    if right >= 0:
        hidden |= columns > rows + right
    if left >= 0:
        hidden |= columns < rows - left
    scores.masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    if s_aux is not None:
        lse = torch.logaddexp(lse, s_aux.double()[:, None])
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0)
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1), lse


def heads(length: int, num_heads: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(length, num_heads, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def paged(parts: list[Tensor], block_size: int, *, garbage: float = torch.nan) -> tuple[Tensor, Tensor]:
    """A cache that holds these sequences in shuffled blocks, and its table; what is not used is garbage."""
    counts = [-(-len(part) // block_size) for part in parts]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(1)).int().tolist()
    cache = torch.full((len(order), block_size, *parts[0].shape[1:]), garbage, dtype=parts[0].dtype)
    table = torch.full((len(parts), max(counts) + 1), -1, dtype=torch.int32)
    for s, part in enumerate(parts):
        for i in range(counts[s]):
            table[s, i] = order.pop()
            rows = part[i * block_size : (i + 1) * block_size]
            cache[table[s, i], : len(rows)] = rows
    return cache, table


class Ragged:
    """Sequences of many lengths, more queries than keys and no keys at all among them."""

    def __init__(self, dtype: torch.dtype, q_lens: list[int], k_lens: list[int]) -> None:
        self.q_lens, self.k_lens = q_lens, k_lens
        self.q = [heads(length, HEADS, dtype, 10 + s) for s, length in enumerate(q_lens)]
        self.k = [heads(length, KV_HEADS, dtype, 20 + s) for s, length in enumerate(k_lens)]
        self.v = [heads(length, KV_HEADS, dtype, 30 + s) for s, length in enumerate(k_lens)]

    def expected(self, used: list[int] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        used = used or self.k_lens
        parts = [reference(q, k[:n], v[:n], **options) for q, k, v, n in zip(self.q, self.k, self.v, used, strict=True)]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)

    def sizes(self) -> tuple[Tensor, Tensor, int, int]:
        return boundaries(self.q_lens), boundaries(self.k_lens), max(self.q_lens), max(self.k_lens)


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    (out, lse), (expected_out, expected_lse) = got, expected
    assert relative_error(out, expected_out) < TOLERANCE[out.dtype]
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert torch.allclose(lse[finite].double(), expected_lse[finite], rtol=1e-4, atol=1e-4)


SLOPES = torch.linspace(0.1, 1, HEADS)
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (7, 0)},
    "window of a causal mask": {"causal": True, "window_size": (7, 3)},
    "right window of 0": {"window_size": (-1, 0)},
    "softcap, slopes, scale": {"causal": True, "softcap": 2.0, "alibi_slopes": SLOPES, "softmax_scale": 0.3},
    "sinks": {"causal": True, "s_aux": torch.linspace(-1, 1, HEADS)},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_varlen(layout: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    ragged = Ragged(dtype, [1, 5, 9, 3, 4], [70, 33, 4, 3, 0])
    starts_q, starts_k, most_q, most_k = ragged.sizes()
    k, v = torch.cat(ragged.k), torch.cat(ragged.v)
    extra: dict[str, Any] = {}
    if layout == "paged":
        (k, table), (v, _) = paged(ragged.k, 16), paged(ragged.v, 16)
        extra = {"block_table": table}
    before = kernel_calls("paged_attention")
    out, lse, probabilities = flash_attn_varlen_func(
        torch.cat(ragged.q), k, v, starts_q, starts_k, most_q, most_k, return_attn_probs=True, **options, **extra
    )
    assert kernel_calls("paged_attention") == before + 1
    assert probabilities is None
    check((out, lse), ragged.expected(**options))
    assert lse.is_contiguous()


def test_a_window_on_both_sides() -> None:
    ragged = Ragged(torch.float32, [1, 5], [70, 33])
    starts_q, starts_k, *most = ragged.sizes()
    tensors = [torch.cat(parts) for parts in (ragged.q, ragged.k, ragged.v)]
    out, lse, _ = flash_attn_varlen_func(
        *tensors, starts_q, starts_k, *most, window_size=(6, 6), return_attn_probs=True
    )
    check((out, lse), ragged.expected(window_size=(6, 6)))


@pytest.mark.parametrize("window_size", [(100, -1), (-1, 100), (100, 100), (3, 7)])
def test_a_window_that_hides_nothing(window_size: tuple[int, int]) -> None:
    """Of as many keys as the longest sequence has, it is none, as in flash-attn; with more queries than keys too."""
    ragged = Ragged(torch.float32, [5, 2], [3, 2])
    starts_q, starts_k, *most = ragged.sizes()
    tensors = [torch.cat(parts) for parts in (ragged.q, ragged.k, ragged.v)]
    out, lse, _ = flash_attn_varlen_func(
        *tensors, starts_q, starts_k, *most, window_size=window_size, return_attn_probs=True
    )
    check((out, lse), ragged.expected())


def test_lse_with_slopes() -> None:
    """Of scores ``slope * (key - query)``; flash-attn 2 adds ``slope * key``: its lse is larger by slope * query."""
    ragged = Ragged(torch.float32, [4], [9])
    starts_q, starts_k, *most = ragged.sizes()
    tensors = [torch.cat(parts) for parts in (ragged.q, ragged.k, ragged.v)]
    options: dict[str, Any] = {"causal": True, "alibi_slopes": SLOPES, "return_attn_probs": True}
    _, lse, _ = flash_attn_varlen_func(*tensors, starts_q, starts_k, *most, **options)
    q, k = (x.transpose(0, 1).double() for x in (ragged.q[0], ragged.k[0]))
    scores = q @ k.repeat_interleave(HEADS // KV_HEADS, 0).transpose(1, 2) / math.sqrt(D)
    scores += SLOPES[:, None, None] * torch.arange(9)
    rows = torch.arange(5, 9)
    flash_attn_2 = scores.masked_fill(torch.arange(9) > rows[:, None], -torch.inf).logsumexp(-1)
    assert torch.allclose(lse.double() + SLOPES[:, None] * rows, flash_attn_2, atol=1e-4)


@pytest.mark.parametrize("function", ["varlen", "kvcache"])
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_a_backward_pass_raises(function: str, argument: str) -> None:
    """Not: gradients from which this attention is left out."""
    tensors = {"q": heads(4, HEADS, torch.float32, 1), **{x: heads(4, KV_HEADS, torch.float32, 2) for x in "kv"}}
    tensors[argument].requires_grad_()
    if function == "varlen":
        starts = boundaries([4])
        results = flash_attn_varlen_func(*tensors.values(), starts, starts, 4, 4, return_attn_probs=True)[:2]
    else:
        q, k, v = (x.unsqueeze(0) for x in tensors.values())
        cache = torch.zeros(1, 8, KV_HEADS, D)
        results = flash_attn_with_kvcache(q, cache, cache.clone(), k, v, cache_seqlens=2, return_softmax_lse=True)
    for result in results:
        with pytest.raises(RuntimeError, match=f"flash_attn_.*{function}.*no gradients"):
            result.sum().backward()
    with torch.no_grad():
        assert not flash_attn_varlen_func(*tensors.values(), boundaries([4]), boundaries([4]), 4, 4).requires_grad


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_only_the_keys_that_are_used(layout: str) -> None:
    ragged = Ragged(torch.float32, [2, 4], [40, 24])
    used = [17, 24]
    starts_q, starts_k, *most = ragged.sizes()
    k, v = torch.cat(ragged.k), torch.cat(ragged.v)
    extra: dict[str, Any] = {}
    given: Tensor | None = starts_k
    if layout == "paged":
        (k, table), (v, _) = paged(ragged.k, 8), paged(ragged.v, 8)
        extra, given = {"block_table": table}, None
    lengths = torch.tensor(used, dtype=torch.int32)
    out = torch.empty_like(torch.cat(ragged.q))
    result = flash_attn_varlen_func(
        torch.cat(ragged.q), k, v, starts_q, given, *most, causal=True, seqused_k=lengths, out=out, **extra
    )
    assert result is out
    assert relative_error(out, ragged.expected(used, causal=True)[0]) < 1e-5


def test_keys_and_values_are_read_where_they_are() -> None:
    """As columns of one matrix of queries, keys and values; and bit for bit as from a paged cache."""
    total = [48, 16]
    qkv = torch.randn(sum(total), HEADS + 2 * KV_HEADS, D, generator=torch.Generator().manual_seed(2))
    q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    starts = boundaries(total)
    out = flash_attn_varlen_func(q, k, v, starts, starts, 48, 48, causal=True)
    (keys, table), (values, _) = paged(list(k.split(total)), 16), paged(list(v.split(total)), 16)
    same = flash_attn_varlen_func(q, keys, values, starts, starts, 48, 48, causal=True, block_table=table)
    assert torch.equal(out, same)


@pytest.mark.parametrize(
    ("new", "rotary"), [(0, None), *((new, turn) for new in (1, 3) for turn in (None, "interleaved", "halves"))]
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "rows", "paged"])
def test_kvcache(layout: str, causal: bool, new: int, rotary: str | None) -> None:
    batch, capacity, past = 3, 48, torch.tensor([0, 13, 40], dtype=torch.int32)
    past = past.clamp(min=1) if not new else past
    seqlen_q = max(new, 1)
    q = heads(batch * seqlen_q, HEADS, torch.float32, 1).unflatten(0, (batch, seqlen_q))
    keys, values = ([heads(capacity, KV_HEADS, torch.float32, 10 * i + s) for s in range(batch)] for i in (1, 2))
    k, v = (heads(batch * new, KV_HEADS, torch.float32, i).unflatten(0, (batch, new)) for i in (5, 6))
    extra: dict[str, Any] = {}
    rows = torch.arange(batch)
    if layout == "paged":
        (k_cache, table), (v_cache, _) = paged(keys, 16), paged(values, 16)
        extra["block_table"] = table
    else:
        k_cache, v_cache = torch.stack(keys), torch.stack(values)
        if layout == "rows":
            rows = torch.tensor([2, 0, 1])
            k_cache, v_cache = torch.empty_like(k_cache), torch.empty_like(v_cache)
            k_cache[rows], v_cache[rows] = torch.stack(keys), torch.stack(values)
            extra["cache_batch_idx"] = rows.int()
    angles = torch.rand(64, D // 4, generator=torch.Generator().manual_seed(3)) * 6  # the first half of a head turns
    if rotary:
        extra |= {
            "rotary_cos": angles.cos(),
            "rotary_sin": angles.sin(),
            "rotary_interleaved": rotary == "interleaved",
        }
    if new:
        extra |= {"k": k, "v": v}
    inputs = [x.clone() for x in (q, k, v)]
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=past, causal=causal, return_softmax_lse=True, **extra
    )
    assert all(map(torch.equal, inputs, (q, k, v)))

    def turned(x: Tensor, positions: Tensor) -> Tensor:
        if not rotary:
            return x
        cos, sin = angles.cos()[positions].unsqueeze(1), angles.sin()[positions].unsqueeze(1)
        part, rest = x.split([D // 2, D // 2], dim=-1)
        a, b = (part[..., ::2], part[..., 1::2]) if rotary == "interleaved" else part.chunk(2, dim=-1)
        pair = a * cos - b * sin, b * cos + a * sin
        part = torch.stack(pair, dim=-1).flatten(-2) if rotary == "interleaved" else torch.cat(pair, dim=-1)
        return torch.cat((part, rest), dim=-1)

    for s in range(batch):
        length = int(past[s])
        positions = length + torch.arange(new)
        written = turned(k[s], positions)
        key, value = torch.cat((keys[s][:length], written)), torch.cat((values[s][:length], v[s]))
        q_positions = length + torch.arange(seqlen_q) * int(causal)
        expected = reference(turned(q[s], q_positions), key, value, causal=causal)
        check((out[s], lse[s]), expected)
        if layout != "paged":
            assert torch.allclose(k_cache[rows[s], length : length + new], written, atol=1e-5)
            assert torch.equal(v_cache[rows[s], length : length + new], v[s])
            assert torch.equal(k_cache[rows[s], length + new :], keys[s][length + new :])


def test_the_whole_cache() -> None:
    q, k, v = (heads(2 * n, h, torch.float32, n).unflatten(0, (2, n)) for n, h in ((1, 6), (20, 2), (20, 2)))
    out = flash_attn_with_kvcache(q, k, v)
    assert torch.equal(out, flash_attn_with_kvcache(q, k, v, cache_seqlens=20))
    for s in range(2):
        assert relative_error(out[s], reference(q[s], k[s], v[s])[0]) < 1e-5


def test_an_empty_batch() -> None:
    q, k = torch.empty(0, HEADS, D), torch.empty(0, KV_HEADS, D)
    starts = torch.zeros(1, dtype=torch.int32)
    assert flash_attn_varlen_func(q, k, k, starts, starts, 0, 0).shape == (0, HEADS, D)


REFUSED_VARLEN: dict[str, dict[str, Any]] = {
    "dropout_p": {"dropout_p": 0.1},
    "window_size": {"window_size": (3, 2)},
    "alibi_slopes: expected None": {"alibi_slopes": SLOPES},
    "alibi_slopes: expected shape": {"alibi_slopes": SLOPES.expand(2, -1), "causal": True},
    "cu_seqlens_k: expected a tensor": {"cu_seqlens_k": None},
    "cu_seqlens_k: expected values": {"cu_seqlens_k": boundaries([4, 5])},
    r"cu_seqlens_k: expected int32 of shape \[3\], got torch.int64": {"cu_seqlens_k": boundaries([4, 4]).long()},
    "cu_seqlens_q: expected int32": {"cu_seqlens_q": boundaries([4, 4]).long()},
    "seqused_k: expected int32": {"seqused_k": torch.tensor([4, 4])},
    r"seqused_k: expected at most .* \[4, 4\]": {"seqused_k": torch.tensor([5, 3], dtype=torch.int32)},
    "window_size: expected .* more queries than keys": {
        "cu_seqlens_k": boundaries([5, 3]),
        "cu_seqlens_q": boundaries([4, 4]),
        "window_size": (3, 3),
    },
    "k: expected shape": {"k": torch.zeros(1, 8, KV_HEADS, D)},
}


@pytest.mark.parametrize(("text", "changed"), REFUSED_VARLEN.items(), ids=REFUSED_VARLEN)
def test_refused_by_varlen(text: str, changed: dict[str, Any]) -> None:
    keys = torch.zeros(8, KV_HEADS, D)
    starts = boundaries([4, 4])
    arguments: dict[str, Any] = {"q": torch.zeros(8, HEADS, D), "k": keys, "v": keys, "cu_seqlens_q": starts}
    arguments |= {"cu_seqlens_k": starts, "max_seqlen_q": 4, "max_seqlen_k": 4}
    with pytest.raises(ValueError, match=text):
        flash_attn_varlen_func(**(arguments | changed))


NEW = torch.ones(2, 1, KV_HEADS, D)
REFUSED_KVCACHE: dict[str, dict[str, Any]] = {
    "q: expected shape": {"q": torch.zeros(2, HEADS, D)},
    "cache_leftpad": {"cache_leftpad": torch.zeros(2, dtype=torch.int32)},
    "cache_batch_idx": {"cache_batch_idx": torch.tensor([1, 0]), "block_table": torch.zeros(2, 1, dtype=torch.int32)},
    "cache_seqlens: expected a tensor": {"k": NEW, "v": NEW},
    "cache_seqlens: expected room": {"k": NEW, "v": NEW, "cache_seqlens": 8},
    "cache_seqlens: expected values >= 0": {
        "k": NEW,
        "v": NEW,
        "cache_seqlens": torch.tensor([-1, 2], dtype=torch.int32),
    },
    "cache_seqlens: expected int32": {"cache_seqlens": torch.tensor([1, 2])},
    # These concern attention alone:
    "window_size": {"k": NEW, "v": NEW, "cache_seqlens": 3, "window_size": (3, 2)},
    "alibi_slopes: expected None": {"k": NEW, "v": NEW, "cache_seqlens": 3, "alibi_slopes": SLOPES},
    r"alibi_slopes: expected shape \[Hq\]": {
        "k": NEW,
        "v": NEW,
        "cache_seqlens": 3,
        "alibi_slopes": SLOPES[:5],
        "causal": True,
    },
    "query: expected Hq": {"k": NEW, "v": NEW, "cache_seqlens": 3, "q": torch.zeros(2, 1, 5, D)},
    "soft_cap": {"k": NEW, "v": NEW, "cache_seqlens": 3, "softcap": -1.0},
    "v: expected a tensor": {"k": NEW, "cache_seqlens": 3},
    "k: expected shape": {"k": NEW[:1], "v": NEW[:1], "cache_seqlens": 3},
    "rotary_sin": {"rotary_cos": torch.zeros(8, 4), "k": NEW, "v": NEW, "cache_seqlens": 3},
    "rotary_cos": {"rotary_cos": torch.zeros(8, 4), "rotary_sin": torch.zeros(8, 4), "cache_seqlens": 3},
}


@pytest.mark.parametrize(("text", "changed"), REFUSED_KVCACHE.items(), ids=REFUSED_KVCACHE)
def test_refused_by_kvcache(text: str, changed: dict[str, Any]) -> None:
    cache = torch.zeros(2, 8, KV_HEADS, D)
    arguments: dict[str, Any] = {"q": torch.zeros(2, 1, HEADS, D), "k_cache": cache, "v_cache": cache.clone()}
    with pytest.raises(ValueError, match=text):
        flash_attn_with_kvcache(**(arguments | changed))
    assert not cache.any()


def test_counts_are_of_known_operators() -> None:
    with pytest.raises(ValueError, match="operator: expected one whose runs are counted, got nonsense"):
        kernel_calls("nonsense")
