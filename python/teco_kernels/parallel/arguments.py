"""Checks of what a collective is given where a process group does the work; csrc/ops/collectives.cpp has the others."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def check_sum(out: Tensor, x: Tensor, shape: torch.Size) -> None:
    """Of a collective that adds up; `shape` is what `out` must have."""
    if x.dtype not in _FLOATING:
        raise TypeError(f"input: expected dtype float32, float16, bfloat16, got {str(x.dtype).removeprefix('torch.')}")
    check_copy(out, x, shape)


def check_copy(out: Tensor, x: Tensor, shape: torch.Size, *, own_row: bool = False) -> None:
    """Of any collective; `own_row`: `x` is the part of `out` that this rank's data comes to lie in."""
    if not x.is_contiguous():
        raise ValueError(f"input: expected a contiguous tensor, got strides {x.stride()}; call .contiguous()")
    _check_like(out, "out", x, shape)
    if not own_row:
        _check_apart(out, "out", x, same_place=out.shape == x.shape)


def check_rows(out: Tensor, x: Tensor, rank: int, world_size: int) -> None:
    """Of a collective that gathers; `x` may be this rank's row of `out`."""
    own_row = len(out) == world_size and out[rank].data_ptr() == x.data_ptr()
    check_copy(out, x, torch.Size((world_size, *x.shape)), own_row=own_row)


def check_root(root: int, world_size: int) -> None:
    """Of a broadcast."""
    if not 0 <= root < world_size:
        raise ValueError(f"root: expected a rank of 0 to {world_size - 1}, got {root}")


def check_norm(normed: Tensor, new_residual: Tensor, x: Tensor, residual: Tensor, weight: Tensor) -> None:
    """Of the fused norm; `x` may be fp64, all else being of another dtype."""
    if x.dtype == torch.float64:
        if not x.is_contiguous():
            raise ValueError(f"input: expected a contiguous tensor, got strides {x.stride()}; call .contiguous()")
        check_sum(new_residual, residual, x.shape)
        _check_like(normed, "out", residual, x.shape)
        _check_apart(normed, "out", x, same_place=False)
    else:
        _check_like(residual, "residual", x, x.shape)
        check_sum(normed, x, x.shape)
    if x.dim() == 0 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"weight: expected shape [hidden_size] with the last dimension of input {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    _check_like(weight, "weight", residual, weight.shape)
    _check_like(new_residual, "residual_out", residual, x.shape)
    _check_apart(normed, "out", residual, same_place=False)
    _check_apart(new_residual, "residual_out", residual, same_place=True)
    _check_apart(new_residual, "residual_out", x, same_place=False)
    _check_apart(new_residual, "residual_out", normed, same_place=False)


def _check_like(tensor: Tensor, name: str, x: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of input ({x.dtype}), got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of input ({x.device}), got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def _check_apart(out: Tensor, name: str, x: Tensor, *, same_place: bool) -> None:
    begin, other = out.data_ptr(), x.data_ptr()
    if same_place and begin == other:
        return
    if begin < other + x.nbytes and other < begin + out.nbytes:
        raise ValueError(f"{name}: expected memory apart from that of what is read")
