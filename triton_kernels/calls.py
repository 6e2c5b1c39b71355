"""Calls that stand for what models ask of the operators: their kernels are compiled ahead of time.

A call names the launcher and its arguments, tensors without memory. Of sizes, kernels depend on no more than which
block they fit in and whether they are multiples of 16; of the tensors, on dtypes and on which of the optional ones are
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
TOKENS, HIDDEN, VOCABULARY = 32, 4096, 32000

Call = tuple[str, tuple[Any, ...]]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int64)


def _rows(tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    return _empty(tokens, size, dtype=dtype)


def _packed(in_features: int, out_features: int, bits: int) -> Tensor:
    groups = in_features // 128
    return _empty(out_features // 16, groups, 64 + 4 * 64 * bits, dtype=torch.uint8)


def _elementwise() -> Iterator[Call]:
    for dtype in DTYPES:
        x, weight = _rows(TOKENS, HIDDEN, dtype), _empty(HIDDEN, dtype=dtype)
        yield "rms_norm", (x, x, weight, 1e-5)
        yield "fused_add_rms_norm", (x, x, x, x, weight, 1e-5)
        yield "silu_and_mul", (x, _rows(TOKENS, 2 * HIDDEN, dtype))
        query, key = _empty(TOKENS, 32, 128, dtype=dtype), _empty(TOKENS, 8, 128, dtype=dtype)
        yield "rotary_embedding", (_ids(TOKENS), query, key, _empty(8192, 128), False)
        yield "embedding", (x, _ids(TOKENS), _rows(VOCABULARY, HIDDEN, dtype), None)
        yield (
            "embedding.gptq",
            (x, _ids(TOKENS), _packed(HIDDEN, VOCABULARY, 8), None, VOCABULARY, HIDDEN, 8, False, None),
        )


def _matmuls() -> Iterator[Call]:
    for dtype in DTYPES:
        for tokens in (1, TOKENS):
            x, out = _rows(tokens, HIDDEN, dtype), _rows(tokens, HIDDEN, dtype)
            yield "dense_matmul", (out, x, _empty(HIDDEN // 16, HIDDEN, 16, dtype=dtype), None, HIDDEN)
            for bits in (2, 3, 4, 8) if dtype in HALVES else (4,):
                weight = _packed(HIDDEN, HIDDEN, bits)
                for order in (None, _empty(HIDDEN, dtype=torch.int32)):
                    yield "gptq_matmul", (out, x, weight, order, None, HIDDEN, HIDDEN, bits, False, False)
            yield "gptq_matmul", (out, x, _packed(HIDDEN, HIDDEN, 4), None, None, HIDDEN, HIDDEN, 4, False, True)
        hidden = _rows(1, HIDDEN, dtype)
        head = _empty(VOCABULARY // 16, HIDDEN, 16, dtype=dtype)
        yield "lm_head_argmax", (_ids(1), _empty(1), _empty(1), hidden, head, None, VOCABULARY)
        yield (
            "lm_head_argmax.gptq",
            (
                _ids(1),
                _empty(1),
                None,
                hidden,
                _packed(HIDDEN, VOCABULARY, 8),
                None,
                None,
                HIDDEN,
                VOCABULARY,
                8,
                False,
                False,
            ),
        )


def _attention() -> Iterator[Call]:
    for dtype in DTYPES:
        for cache_dtype in (dtype, torch.int8, torch.float8_e4m3fn) if dtype in HALVES else (dtype,):
            cache = _empty(64, 16, 8, 128, dtype=cache_dtype)
            scale = None if cache_dtype == dtype else _empty(64, 16, 8)
            heads = _empty(TOKENS, 8, 128, dtype=dtype)
            yield "reshape_and_cache", (heads, heads, cache, cache, _ids(TOKENS), scale, scale)
            for head_dim in (64, 128, 256, 512) if cache_dtype == dtype else (128,):
                query = _empty(TOKENS, 32, head_dim, dtype=dtype)
                cache = _empty(64, 16, 8, head_dim, dtype=cache_dtype)
                for starts in (None, _empty(5, dtype=torch.int32)):
                    sequences = TOKENS if starts is None else 4
                    lengths = _empty(sequences, dtype=torch.int32)
                    table = _empty(sequences, 64, dtype=torch.int32)
                    yield (
                        "paged_attention",
                        (
                            query,
                            None,
                            query,
                            cache,
                            cache,
                            table,
                            lengths,
                            starts,
                            None,
                            None,
                            scale,
                            scale,
                            0.125,
                            0.0,
                            0,
                            True,
                        ),
                    )
        state, lse = _empty(TOKENS, 32, 128, dtype=dtype), _empty(TOKENS, 32)
        yield "merge_attention_states", (state, lse, state, lse, state, lse)
    for dtype in (torch.float16, torch.int8):  # bytes are moved: by the size of an element
        blocks = _empty(64, 16, 8, 128, dtype=dtype)
        yield "copy_blocks", (blocks, blocks, _ids(2, 2))


def _tokens() -> Iterator[Call]:
    per_row, ids = _empty(TOKENS), _ids(TOKENS)
    for dtype in DTYPES:
        yield "sample", (ids, _rows(TOKENS, VOCABULARY, dtype), per_row, ids, per_row, per_row, ids, ids)
        target, recycled = _empty(TOKENS, 3, VOCABULARY, dtype=dtype), _empty(TOKENS, 2, VOCABULARY, dtype=dtype)
        yield "verify_recycled_sampled", (ids.int(), ids, target, recycled, _ids(TOKENS, 2), ids, ids)
    yield "verify_recycled", (ids.int(), _ids(TOKENS, 3), _ids(TOKENS, 2))


def calls() -> Iterator[Call]:
    """All of them. `recycle_project` has no kernel of its own."""
    yield from _elementwise()
    yield from _matmuls()
    yield from _attention()
    yield from _tokens()
