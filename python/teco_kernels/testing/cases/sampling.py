"""Cases of `sample`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from teco_kernels.ops import sampling
from teco_kernels.testing.case import TOLERANCE, Case, Inputs

# (sequences, vocabulary): few tokens, a ragged tail, an empty batch, a model's vocabulary.
SHAPES = [(8, 5), (16, 1003), (0, 64), (16, 49152)]

# What a request may ask for; "mixed" gives every row another of the above.
FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.8},
    "min_p": {"min_p": 0.05},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.95},
    "flat": {"temperature": 50.0, "top_p": 0.9},
    "all": {"temperature": 1.3, "min_p": 0.001, "top_k": 50, "top_p": 0.9},
}
DEFAULTS: dict[str, float] = {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0}


def _inputs(sequences: int, vocab_size: int, dtype: torch.dtype, filters: str, generator: torch.Generator) -> Inputs:
    logits = 3 * torch.randn(sequences, vocab_size, generator=generator)
    logits[:, 1::7] = -torch.inf
    asked = list(FILTERS.values()) if filters == "mixed" else [FILTERS[filters]]
    rows = [DEFAULTS | asked[r % len(asked)] for r in range(sequences)]
    return {
        "logits": logits.to(dtype),
        "temperature": torch.tensor([row["temperature"] for row in rows]),
        "top_k": torch.tensor([row["top_k"] for row in rows], dtype=torch.int64),
        "top_p": torch.tensor([row["top_p"] for row in rows]),
        "min_p": torch.tensor([row["min_p"] for row in rows]),
        "seed": torch.randint(2**62, (sequences,), generator=generator) - 2**61,
        "offset": torch.arange(sequences),
    }


def cases() -> Iterator[Case]:
    """Every filter on a model's vocabulary, and their mixture over all shapes and dtypes."""
    for dtype in TOLERANCE:
        for sequences, vocab_size in SHAPES:
            large = vocab_size >= 4096
            for filters in [*FILTERS, "mixed"] if large and dtype == torch.float32 else ["mixed"]:
                yield Case(
                    operator="sample",
                    params={"sequences": sequences, "vocab_size": vocab_size, "filters": filters},
                    dtype=dtype,
                    make_inputs=partial(_inputs, sequences, vocab_size, dtype, filters),
                    function=sampling.sample,
                    reference=sampling.sample_reference,
                    max_error=0.0,
                    bytes_moved=sequences * vocab_size * dtype.itemsize,
                    flops=20 * sequences * vocab_size,
                    benchmark=large,
                )
