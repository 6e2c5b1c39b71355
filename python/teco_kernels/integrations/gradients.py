"""The operators have no gradients: where one would be missing, the backward pass says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, result: list[Tensor], *inputs: Tensor | None) -> Tensor:
        ctx.name = name
        return result[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{ctx.name}: expected no backward pass through it, it has no gradients")


def without_gradient(name: str, result: Tensor, *inputs: Tensor | None) -> Tensor:
    """What was computed from `inputs`; a backward pass that comes to it raises a RuntimeError of that name.

    Without this, autograd would take it for a constant, and leave what lies before it out of the gradients.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        # In a list, or else the result would be a view of it, which cannot be changed in place.
        result = _NoGradient.apply(name, [result], *inputs)  # type: ignore[no-untyped-call]
    return result
