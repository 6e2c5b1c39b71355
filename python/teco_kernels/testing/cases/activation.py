"""Cases of `silu_and_mul`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from teco_kernels.ops import activation
from teco_kernels.testing.case import TOLERANCE, Case, Inputs

# (tokens, d)
SHAPES = [(1, 1536), (3, 37), (0, 64), (3, 0), (512, 4096)]


def _inputs(tokens: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"x": (4 * torch.randn(tokens, 2 * d, generator=generator)).to(dtype)}


def cases() -> Iterator[Case]:
    """All shapes and dtypes."""
    for dtype in TOLERANCE:
        for tokens, d in SHAPES:
            yield Case(
                operator="silu_and_mul",
                params={"tokens": tokens, "d": d},
                dtype=dtype,
                make_inputs=partial(_inputs, tokens, d, dtype),
                function=activation.silu_and_mul,
                reference=activation.silu_and_mul_reference,
                max_error=TOLERANCE[dtype],
                bytes_moved=3 * tokens * d * dtype.itemsize,
                flops=6 * tokens * d,
                benchmark=tokens >= 512,
            )
