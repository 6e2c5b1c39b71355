"""Cases of `rms_norm` and `fused_add_rms_norm`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from teco_kernels.ops import norm
from teco_kernels.testing.case import TOLERANCE, Case, Inputs

# (tokens, hidden size): a decode step, ragged tails, an empty batch, one element, none, a prefill.
SHAPES = [(1, 576), (3, 37), (2, 577), (0, 64), (5, 1), (3, 0), (512, 4096)]


def _inputs(tokens: int, hidden_size: int, dtype: torch.dtype, residual: bool, generator: torch.Generator) -> Inputs:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs: Inputs = {"x": normal(tokens, hidden_size), "weight": normal(hidden_size), "eps": 1e-5}
    if residual:
        inputs["residual"] = normal(tokens, hidden_size)
    return inputs


def cases() -> Iterator[Case]:
    """Both operators over all shapes and dtypes."""
    for dtype in TOLERANCE:
        for tokens, hidden_size in SHAPES:
            for residual in (False, True):
                tensors = 4 if residual else 2
                yield Case(
                    operator="fused_add_rms_norm" if residual else "rms_norm",
                    params={"tokens": tokens, "hidden_size": hidden_size},
                    dtype=dtype,
                    make_inputs=partial(_inputs, tokens, hidden_size, dtype, residual),
                    function=norm.fused_add_rms_norm if residual else norm.rms_norm,
                    reference=norm.fused_add_rms_norm_reference if residual else norm.rms_norm_reference,
                    max_error=TOLERANCE[dtype],
                    bytes_moved=(tensors * tokens + 1) * hidden_size * dtype.itemsize,
                    flops=(5 if residual else 4) * tokens * hidden_size,
                    benchmark=tokens >= 512,
                )
