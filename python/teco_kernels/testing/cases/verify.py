"""Cases of `verify_recycled` and `verify_recycled_sampled`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from teco_kernels.ops import verify
from teco_kernels.testing.case import TOLERANCE, Case, Inputs

# (sequences, recycled tokens of each, vocabulary): one token, ragged sizes, no sequences, none recycled, a model's.
SHAPES = [(16, 1, 64), (40, 3, 37), (0, 2, 8), (5, 0, 20), (16, 2, 49152)]


def _greedy_inputs(sequences: int, recycled: int, generator: torch.Generator) -> Inputs:
    """Of two tokens: prefixes of all lengths agree."""
    return {
        "target_token_ids": torch.randint(2, (sequences, recycled + 1), generator=generator),
        "recycled_token_ids": torch.randint(2, (sequences, recycled), generator=generator),
    }


def _sampled_inputs(
    sequences: int, recycled: int, vocab_size: int, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    """Recycled tokens drawn from distributions that are near the target's."""
    logits = 2 * torch.randn(sequences, recycled + 1, vocab_size, generator=generator)
    near = logits[:, :recycled] + torch.randn(sequences, recycled, vocab_size, generator=generator)
    logits[:, :, 1::5] = -torch.inf
    target, probs = logits.softmax(-1).to(dtype), near.softmax(-1).to(dtype)
    rows = probs.float().reshape(-1, vocab_size)
    ids = torch.multinomial(rows, 1, generator=generator) if len(rows) else torch.empty(0, dtype=torch.int64)
    return {
        "target_probs": target,
        "recycled_probs": probs,
        "recycled_token_ids": ids.view(sequences, recycled),
        "seed": torch.randint(2**62, (sequences,), generator=generator) - 2**61,
        "offset": torch.arange(sequences),
    }


def cases() -> Iterator[Case]:
    """Greedy verification, and the rejection rule in all dtypes."""
    for sequences, recycled, _ in SHAPES[:-1]:
        yield Case(
            operator="verify_recycled",
            params={"sequences": sequences, "recycled": recycled},
            dtype=torch.int64,
            make_inputs=partial(_greedy_inputs, sequences, recycled),
            function=verify.verify_recycled,
            reference=verify.verify_recycled_reference,
            max_error=0.0,
            bytes_moved=sequences * (8 * (2 * recycled + 1) + 4),
            flops=0,
        )
    for dtype in TOLERANCE:
        for sequences, recycled, vocab_size in SHAPES:
            yield Case(
                operator="verify_recycled_sampled",
                params={"sequences": sequences, "recycled": recycled, "vocab_size": vocab_size},
                dtype=dtype,
                make_inputs=partial(_sampled_inputs, sequences, recycled, vocab_size, dtype),
                function=verify.verify_recycled_sampled,
                reference=verify.verify_recycled_sampled_reference,
                max_error=0.0,
                # One row of each, where the next token is drawn.
                bytes_moved=sequences * 2 * vocab_size * dtype.itemsize,
                flops=4 * sequences * vocab_size,
                benchmark=vocab_size >= 4096,
            )
