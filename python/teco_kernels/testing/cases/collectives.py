"""Cases of the collectives, of a rank that is alone: schemas, checks and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teco_kernels import parallel
from teco_kernels.ops._library import emulates_cuda, emulation_in_use, has_kernel
from teco_kernels.ops.norm import fused_add_rms_norm_reference
from teco_kernels.testing.case import TOLERANCE, Case, Inputs

# (tokens, hidden size): a decode step, a ragged tail, an empty batch.
SHAPES = [(1, 576), (3, 37), (0, 64)]


@cache
def _alone() -> parallel.Communicator:
    return parallel.Communicator.alone()


@cache
def _alone_with_kernels(device: torch.device, emulation: Path | None) -> parallel.Communicator:
    return parallel.Communicator.alone(device)


def _with_one_rank(collective: Callable[..., Any]) -> Callable[..., Any]:
    comm = _alone()

    def call(x: Tensor, **inputs: Any) -> Any:
        if (x.is_cuda or emulates_cuda()) and has_kernel("all_reduce", "cuda"):
            return collective(x, **inputs, comm=_alone_with_kernels(x.device, emulation_in_use()))
        return collective(x, **inputs, comm=comm)

    return call


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, names: tuple[str, ...], generator: torch.Generator) -> Inputs:
    return {name: torch.randn(shape, generator=generator).to(dtype) for name in names}


def _norm_inputs(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    inputs = _inputs(shape, dtype, ("x", "residual"), generator)
    return inputs | {"weight": torch.randn(shape[1], generator=generator).to(dtype), "eps": 1e-5}


def _norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return fused_add_rms_norm_reference(x, residual, weight, eps)


def cases() -> Iterator[Case]:
    """Every collective over all shapes and dtypes."""
    # What a rank has that is alone: the sum is its own, and rows per rank are one.
    references: dict[str, Callable[..., Any]] = {
        "all_reduce": lambda x: x.double(),
        "all_gather": lambda x: x[None].double(),
        "reduce_scatter": lambda x: x[0].double(),
        "broadcast": lambda x: x.double(),
        "all_reduce_rms_norm": _norm_reference,
    }
    for dtype in TOLERANCE:
        for tokens, hidden_size in SHAPES:
            for operator, reference in references.items():
                shape = (1, tokens, hidden_size) if operator == "reduce_scatter" else (tokens, hidden_size)
                norm = operator == "all_reduce_rms_norm"
                yield Case(
                    operator=operator,
                    params={"tokens": tokens, "hidden_size": hidden_size},
                    dtype=dtype,
                    make_inputs=partial(_norm_inputs, (tokens, hidden_size), dtype)
                    if norm
                    else partial(_inputs, shape, dtype, ("x",)),
                    function=_with_one_rank(getattr(parallel, operator)),
                    reference=reference,
                    max_error=TOLERANCE[dtype],
                    bytes_moved=(4 if norm else 2) * tokens * hidden_size * dtype.itemsize,
                    flops=5 * tokens * hidden_size if norm else 0,
                )
