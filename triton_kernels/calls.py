"""Calls that stand for what models ask of the operators: their kernels are compiled ahead of time.

A case is an operator, the dtype of its activations, and sizes and options by the names of the case table. Of it become
calls of launchers, with tensors without memory. Of sizes, kernels depend on no more than which block they fit in and
whether they are multiples of 16; of the tensors, on dtypes and on which of the optional ones are there. What a case
does not name is as most models have it; the number of rows is then both few and many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from teco_kernels.triton_kernels import launchers
from teco_kernels.triton_kernels._launch import Launch, ceil_div, recorded

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
TOKENS, HIDDEN, VOCABULARY = 32, 4096, 32000

#: What the kernels of models differ in: heads, and rows of a norm (of heads, then of hidden states up to the size).
HEAD_DIMS = (64, 128, 256)
HEAD_NORMS, HIDDEN_NORMS = (64, 128, 256), (1024, 2048, 4096)

#: A launcher's name, and its arguments.
Call = tuple[str, tuple[Any, ...]]
#: An operator, the dtype of its activations, and what else it is told.
CaseOf = tuple[str, torch.dtype, dict[str, Any]]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int64)


def _order(size: int, act_order: bool) -> Tensor | None:
    return _empty(size, dtype=torch.int32) if act_order else None


def _bias(size: int, bias: bool) -> Tensor | None:
    return _empty(size) if bias else None


def _packed(in_features: int, out_features: int, bits: int, group_size: int) -> Tensor:
    groups, blocks = ceil_div(in_features, group_size), ceil_div(group_size, 32)
    return _empty(ceil_div(out_features, 16), groups, 64 + blocks * 64 * bits, dtype=torch.uint8)


def _dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype  # type: ignore[no-any-return]


def _few_and_many(rows: int | None) -> tuple[int, ...]:
    return (1, TOKENS) if rows is None else (rows,)


def _rms_norm(dtype: torch.dtype, *, hidden_size: int = HIDDEN, **_: Any) -> Iterator[Call]:
    x = _empty(TOKENS, hidden_size, dtype=dtype)
    yield "rms_norm", (x, x, x[0], 1e-5)


def _fused_add_rms_norm(dtype: torch.dtype, *, hidden_size: int = HIDDEN, **_: Any) -> Iterator[Call]:
    x = _empty(TOKENS, hidden_size, dtype=dtype)
    yield "fused_add_rms_norm", (x, x, x, x, x[0], 1e-5)


def _silu_and_mul(dtype: torch.dtype, *, d: int = HIDDEN, **_: Any) -> Iterator[Call]:
    yield "silu_and_mul", (_empty(TOKENS, d, dtype=dtype), _empty(TOKENS, 2 * d, dtype=dtype))


def _rotary_embedding(
    dtype: torch.dtype, *, D: int = 128, rotary_dim: int | None = None, interleaved: bool = False, **_: Any
) -> Iterator[Call]:
    query, key = _empty(TOKENS, 32, D, dtype=dtype), _empty(TOKENS, 8, D, dtype=dtype)
    yield "rotary_embedding", (_ids(TOKENS), query, key, _empty(8192, rotary_dim or D), interleaved)


def _embedding(
    dtype: torch.dtype,
    *,
    hidden_size: int = HIDDEN,
    vocab_size: int = VOCABULARY,
    weight_dtype: torch.dtype | None = None,
    bits: int = 0,
    group_size: int = 128,
    act_order: bool = False,
    minimum: bool = False,
    **_: Any,
) -> Iterator[Call]:
    out = _empty(TOKENS, hidden_size, dtype=dtype)
    if bits:
        weight = _packed(hidden_size, vocab_size, bits, group_size)
        order = _order(hidden_size, act_order)
        yield "embedding.gptq", (out, _ids(TOKENS), weight, order, vocab_size, hidden_size, bits, minimum, None)
    else:
        yield "embedding", (out, _ids(TOKENS), _empty(vocab_size, hidden_size, dtype=weight_dtype or dtype), None)


def _floating(dtype: torch.dtype, in_features: int, out_features: int, weight: str) -> Tensor:
    if weight == "plain":
        return _empty(out_features, in_features, dtype=dtype)
    return _empty(ceil_div(out_features, 16), in_features, 16, dtype=dtype)


def _dense_matmul(
    dtype: torch.dtype,
    *,
    rows: int | None = None,
    in_features: int = HIDDEN,
    out_features: int = HIDDEN,
    weight: str = "packed",
    weight_dtype: torch.dtype | None = None,
    bias: bool = False,
    **_: Any,
) -> Iterator[Call]:
    values = _floating(weight_dtype or dtype, in_features, out_features, weight)
    for count in _few_and_many(rows):
        x, out = _empty(count, in_features, dtype=dtype), _empty(count, out_features, dtype=dtype)
        yield "dense_matmul", (out, x, values, _bias(out_features, bias), out_features)


def _gptq_matmul(
    dtype: torch.dtype,
    *,
    rows: int | None = None,
    in_features: int = HIDDEN,
    out_features: int = HIDDEN,
    bits: int = 4,
    group_size: int = 128,
    activation: str = "exact",
    act_order: bool = False,
    minimum: bool = False,
    bias: bool = False,
    **_: Any,
) -> Iterator[Call]:
    weight = _packed(in_features, out_features, bits, group_size)
    order, added = _order(in_features, act_order), _bias(out_features, bias)
    for count in _few_and_many(rows):
        x, out = _empty(count, in_features, dtype=dtype), _empty(count, out_features, dtype=dtype)
        sizes = (in_features, out_features, bits, minimum, activation == "int8")
        yield "gptq_matmul", (out, x, weight, order, added, *sizes)


def _recycle_project(
    dtype: torch.dtype, *, tokens: int | None = None, hidden_size: int = HIDDEN, **kind: Any
) -> Iterator[Call]:
    """By the kernels of which it is made."""
    embedding = {"bits": 8, "group_size": kind.get("group_size", 128)} if "bits" in kind else kind
    yield from _embedding(dtype, hidden_size=hidden_size, **embedding)
    yield from _rms_norm(dtype, hidden_size=hidden_size)
    matmul = _gptq_matmul if "bits" in kind else _dense_matmul
    yield from matmul(dtype, rows=tokens, in_features=2 * hidden_size, out_features=hidden_size, **kind)


def _lm_head_argmax(
    dtype: torch.dtype,
    *,
    tokens: int | None = None,
    in_features: int = HIDDEN,
    out_features: int = VOCABULARY,
    weight: str = "packed",
    weight_dtype: torch.dtype | None = None,
    bits: int = 0,
    group_size: int = 128,
    activation: str = "exact",
    act_order: bool = False,
    minimum: bool = False,
    bias: bool = False,
    logsumexp: bool = False,
    **_: Any,
) -> Iterator[Call]:
    added = _bias(out_features, bias)
    for count in _few_and_many(tokens):
        hidden = _empty(count, in_features, dtype=dtype)
        outputs = (_ids(count), _empty(count), _empty(count) if logsumexp else None)
        if bits:
            packed, order = _packed(in_features, out_features, bits, group_size), _order(in_features, act_order)
            sizes = (in_features, out_features, bits, minimum, activation == "int8")
            yield "lm_head_argmax.gptq", (*outputs, hidden, packed, order, added, *sizes)
        else:
            values = _floating(weight_dtype or dtype, in_features, out_features, weight)
            yield "lm_head_argmax", (*outputs, hidden, values, added, out_features)


def _cache(cache_dtype: torch.dtype, head_dim: int, scale: str) -> tuple[Tensor, Tensor | None]:
    """A cache, and its scale where its elements are of 8 bits."""
    cache = _empty(64, 16, 8, head_dim, dtype=cache_dtype)
    if cache_dtype.itemsize > 1:
        return cache, None
    return cache, _empty() if scale == "one" else _empty(64, 16, 8)


def _reshape_and_cache(
    dtype: torch.dtype, *, D: int = 128, cache_dtype: torch.dtype | str | None = None, scale: str = "per_slot", **_: Any
) -> Iterator[Call]:
    cache, scales = _cache(_dtype_of(cache_dtype or dtype), D, scale)
    heads = _empty(TOKENS, 8, D, dtype=dtype)
    yield "reshape_and_cache", (heads, heads, cache, cache, _ids(TOKENS), scales, scales)


def _paged_attention(
    dtype: torch.dtype,
    *,
    head_dim: int = 128,
    cache_dtype: torch.dtype | str | None = None,
    soft_cap: float = 0.0,
    alibi_slopes: bool = False,
    sinks: bool = False,
    return_lse: bool = False,
    causal: bool = True,
    **_: Any,
) -> Iterator[Call]:
    """Of decode, then of prefill."""
    query = _empty(TOKENS, 32, head_dim, dtype=dtype)
    cache, scale = _cache(_dtype_of(cache_dtype or dtype), head_dim, "per_slot")
    lse, per_head = _empty(TOKENS, 32) if return_lse else None, _empty(32)
    optional = (per_head if alibi_slopes else None, per_head if sinks else None, scale, scale)
    for sequences, starts in ((TOKENS, None), (4, _empty(5, dtype=torch.int32))):
        table, lengths = _empty(sequences, 64, dtype=torch.int32), _empty(sequences, dtype=torch.int32)
        tensors = (query, lse, query, cache, cache, table, lengths, starts, *optional)
        yield "paged_attention", (*tensors, 0.125, float(soft_cap), 0, causal)


def _merge_attention_states(dtype: torch.dtype, *, head_dim: int = 128, **_: Any) -> Iterator[Call]:
    state, lse = _empty(TOKENS, 32, head_dim, dtype=dtype), _empty(TOKENS, 32)
    yield "merge_attention_states", (state, lse, state, lse, state, lse)


def _copy_blocks(dtype: torch.dtype, **_: Any) -> Iterator[Call]:
    blocks = _empty(64, 16, 8, 128, dtype=dtype)
    yield "copy_blocks", (blocks, blocks, _ids(2, 2))


def _sample(dtype: torch.dtype, *, vocab_size: int = VOCABULARY, **_: Any) -> Iterator[Call]:
    per_row, ids = _empty(TOKENS), _ids(TOKENS)
    yield "sample", (ids, _empty(TOKENS, vocab_size, dtype=dtype), per_row, ids, per_row, per_row, ids, ids)


def _verify_recycled(dtype: torch.dtype, *, recycled: int = 2, **_: Any) -> Iterator[Call]:
    lengths = _empty(TOKENS, dtype=torch.int32)
    yield "verify_recycled", (lengths, _ids(TOKENS, recycled + 1), _ids(TOKENS, recycled))


def _verify_recycled_sampled(
    dtype: torch.dtype, *, recycled: int = 2, vocab_size: int = VOCABULARY, **_: Any
) -> Iterator[Call]:
    lengths, ids = _empty(TOKENS, dtype=torch.int32), _ids(TOKENS)
    target, guessed = (_empty(TOKENS, count, vocab_size, dtype=dtype) for count in (recycled + 1, recycled))
    yield "verify_recycled_sampled", (lengths, ids, target, guessed, _ids(TOKENS, recycled), ids, ids)


_OPERATORS: dict[str, Callable[..., Iterator[Call]]] = {
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "silu_and_mul": _silu_and_mul,
    "rotary_embedding": _rotary_embedding,
    "dense_matmul": _dense_matmul,
    "gptq_matmul": _gptq_matmul,
    "recycle_project": _recycle_project,
    "lm_head_argmax": _lm_head_argmax,
    "reshape_and_cache": _reshape_and_cache,
    "paged_attention": _paged_attention,
    "merge_attention_states": _merge_attention_states,
    "copy_blocks": _copy_blocks,
    "swap_blocks": _copy_blocks,
    "sample": _sample,
    "verify_recycled": _verify_recycled,
    "verify_recycled_sampled": _verify_recycled_sampled,
}


def calls_of(operator: str, dtype: torch.dtype, **case: Any) -> list[Call]:
    """What a case needs of the launchers; what it has that does not matter to the kernels is ignored."""
    return list(_OPERATORS[operator](dtype, **case))


def cases() -> Iterator[CaseOf]:
    """What is compiled ahead of time. `recycle_project` and `swap_blocks` have no kernels of their own."""
    for dtype in DTYPES:
        is_half = dtype in HALVES
        for operator in ("silu_and_mul", "embedding", "sample", "verify_recycled_sampled"):
            yield operator, dtype, {}
        for size in (*HEAD_NORMS, *HIDDEN_NORMS):
            yield "rms_norm", dtype, {"hidden_size": size}
        for size in HIDDEN_NORMS:
            yield "fused_add_rms_norm", dtype, {"hidden_size": size}
        yield "embedding", dtype, {"bits": 8}
        yield "dense_matmul", dtype, {}
        yield "dense_matmul", dtype, {"bias": True}
        for bits in (2, 3, 4, 8) if is_half else (4,):
            for act_order in (False, True):
                yield "gptq_matmul", dtype, {"bits": bits, "act_order": act_order}
        for activation in ("exact", "int8"):
            yield "gptq_matmul", dtype, {"activation": activation}
            yield "gptq_matmul", dtype, {"activation": activation, "bias": True}
            yield "gptq_matmul", dtype, {"activation": activation, "minimum": True}
        for head in ({"weight": "packed"}, {"weight": "packed", "logsumexp": True}, {"weight": "plain"}, {"bits": 8}):
            yield "lm_head_argmax", dtype, head
        for head_dim in HEAD_DIMS:
            yield "rotary_embedding", dtype, {"D": head_dim}
            yield "merge_attention_states", dtype, {"head_dim": head_dim}
            for cache_dtype in (dtype, torch.int8, torch.float8_e4m3fn) if is_half else (dtype,):
                yield "reshape_and_cache", dtype, {"D": head_dim, "cache_dtype": cache_dtype}
                yield "paged_attention", dtype, {"head_dim": head_dim, "cache_dtype": cache_dtype}
        yield "paged_attention", dtype, {"head_dim": 512}
        if is_half:
            yield "paged_attention", dtype, {"return_lse": True}
            yield "paged_attention", dtype, {"head_dim": 64, "sinks": True}
            yield "paged_attention", dtype, {"head_dim": 256, "soft_cap": 50.0}
    yield "verify_recycled", torch.int64, {}
    for dtype in (torch.float32, torch.float16, torch.int8):  # bytes are moved: by the size of an element
        yield "copy_blocks", dtype, {}


def calls() -> Iterator[Call]:
    """Those of all `cases`."""
    for operator, dtype, case in cases():
        yield from calls_of(operator, dtype, **case)


def launches_of(made: Iterable[Call]) -> list[Launch]:
    """What calls would launch."""
    functions = launchers()

    def launch() -> None:
        for name, arguments in made:
            functions[name](*arguments)

    return recorded(launch)
