"""Cases of `rotary_embedding`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from teco_kernels.ops import rotary
from teco_kernels.ops.rope import cos_sin_cache
from teco_kernels.testing.case import TOLERANCE, Case, Inputs

MAX_POSITION = 2048

# (tokens, query heads, kv heads, head_dim, rotary_dim): a decode step, ragged tails, part of a head, an empty batch,
# nothing to rotate, a prefill.
SHAPES = [
    (1, 9, 3, 64, 64),
    (5, 2, 1, 44, 44),
    (4, 2, 2, 80, 20),
    (3, 1, 1, 6, 6),
    (0, 4, 4, 64, 64),
    (2, 3, 1, 32, 0),
    (1024, 32, 8, 128, 128),
]


def _inputs(
    tokens: int, Hq: int, Hkv: int, D: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool, gen: torch.Generator
) -> Inputs:
    # Query and key as views of one merged projection, with the value's share after them; apart if interleaved.
    merged = torch.randn(tokens, Hq + 2 * Hkv, D, generator=gen).to(dtype)
    query, key = merged[:, :Hq], merged[:, Hq : Hq + Hkv]
    if tokens == 0 or interleaved:  # opcheck cannot copy an empty view with strides
        query, key = (part.clone(memory_format=torch.contiguous_format) for part in (query, key))
    return {
        "positions": torch.randint(MAX_POSITION, (tokens,), generator=gen),
        "query": query,
        "key": key,
        "cos_sin_cache": cos_sin_cache(rotary_dim, MAX_POSITION, 10000.0),
        "interleaved": interleaved,
    }


def cases() -> Iterator[Case]:
    """All shapes and dtypes; interleaved pairs, which load and store alike, in fp32 only."""
    for dtype in TOLERANCE:
        for tokens, Hq, Hkv, D, rotary_dim in SHAPES:
            for interleaved in (False, True) if dtype == torch.float32 else (False,):
                rotated = tokens * (Hq + Hkv) * rotary_dim
                yield Case(
                    operator="rotary_embedding",
                    params={
                        "tokens": tokens,
                        "Hq": Hq,
                        "Hkv": Hkv,
                        "D": D,
                        "rotary_dim": rotary_dim,
                        "interleaved": interleaved,
                    },
                    dtype=dtype,
                    make_inputs=partial(_inputs, tokens, Hq, Hkv, D, rotary_dim, dtype, interleaved),
                    function=rotary.rotary_embedding,
                    reference=rotary.rotary_embedding_reference,
                    mutates=("query", "key"),
                    max_error=TOLERANCE[dtype],
                    bytes_moved=2 * rotated * dtype.itemsize + tokens * (8 + 4 * rotary_dim),
                    flops=3 * rotated,
                    benchmark=tokens >= 512,
                )
