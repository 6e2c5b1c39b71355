"""Cases of `embedding`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from teco_kernels.ops import embeddings
from teco_kernels.testing.case import TOLERANCE, Case, Inputs

# (tokens, vocabulary, hidden size): a decode step, a ragged tail, an empty batch, a prefill.
SHAPES = [(1, 300, 576), (3, 7, 37), (0, 5, 64), (2048, 32000, 1024)]


def _inputs(
    tokens: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    generator: torch.Generator,
) -> Inputs:
    return {
        "token_ids": torch.randint(vocab_size, (tokens,), generator=generator),
        "weight": torch.randn(vocab_size, hidden_size, generator=generator).to(weight_dtype),
        "dtype": dtype,
    }


def cases() -> Iterator[Case]:
    """All shapes, each dtype from each dtype of weight."""
    for dtype in TOLERANCE:
        for weight_dtype in TOLERANCE:
            for tokens, vocab_size, hidden_size in SHAPES:
                yield Case(
                    operator="embedding",
                    params={
                        "tokens": tokens,
                        "vocab_size": vocab_size,
                        "hidden_size": hidden_size,
                        "weight_dtype": weight_dtype,
                    },
                    dtype=dtype,
                    make_inputs=partial(_inputs, tokens, vocab_size, hidden_size, dtype, weight_dtype),
                    function=embeddings.embedding,
                    reference=embeddings.embedding_reference,
                    max_error=TOLERANCE[dtype],
                    bytes_moved=tokens * hidden_size * (dtype.itemsize + weight_dtype.itemsize),
                    flops=0,
                    benchmark=tokens >= 512 and dtype == torch.float32 and weight_dtype == torch.float16,
                )
