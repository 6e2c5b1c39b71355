"""Parameters that a caller gives once for all rows, or one per row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def per_row(
    value: float | Sequence[float] | Tensor, operator: str, name: str, dtype: torch.dtype, rows: Tensor
) -> Tensor:
    """The parameter `name` as a tensor with one element per row, on the device of `rows`."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not dtype.is_floating_point:
            raise TypeError(f"{operator}: {name}: expected integers, got dtype {value.dtype}")
        return value.to(dtype).contiguous()
    if isinstance(value, (int, float)):
        _check_number(value, operator, name, dtype)
        return _repeated(value, rows.shape[0], dtype, rows.device)
    for number in value:
        _check_number(number, operator, name, dtype)
    return torch.tensor(value, dtype=dtype, device=rows.device)


@lru_cache(maxsize=64)
def _repeated(value: float, num_rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, for a decode step asks for the same ones each time; only read."""
    return torch.full((num_rows,), value, dtype=dtype, device=device)


def _check_number(number: object, operator: str, name: str, dtype: torch.dtype) -> None:
    expected, types = ("a number", (int, float)) if dtype.is_floating_point else ("an integer", (int,))
    if not isinstance(number, types):
        raise TypeError(f"{operator}: {name}: expected {expected}, or one per row, got {number!r}")
    if isinstance(number, int) and not -(2**63) <= number < 2**63:
        raise ValueError(f"{operator}: {name}: expected a 64-bit number, got {number}")
