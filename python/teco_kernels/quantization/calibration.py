"""What a quantizer learns from text: windows of tokens, the Hessian of each linear layer's inputs, and their drift."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS_AT_ONCE, _FEATURES_AT_ONCE = 4096, 256


def token_windows(token_ids: list[int], num_sequences: int, length: int) -> Tensor:
    """Windows of a long text, spread evenly over it: int64 ``[num_sequences, length]``.

    Raises
    ------
    ValueError
        When the text is too short for one window. Windows of a text that is short for all of them overlap.
    """
    if num_sequences < 1 or length < 1:
        raise ValueError(f"num_sequences, sequence_length: expected positive numbers, got {num_sequences}, {length}")
    if len(token_ids) < length:
        raise ValueError(f"calibration text: expected at least {length} tokens, got {len(token_ids)}")
    last = len(token_ids) - length
    starts = [last * index // max(num_sequences - 1, 1) for index in range(num_sequences)]
    return torch.tensor([token_ids[start : start + length] for start in starts])


class Hessian:
    """Mean of ``2 x x^T`` over the rows x that it has seen: products in fp32, their sum in float64."""

    def __init__(self, in_features: int) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64)
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of ``[..., in_features]``."""
        for rows in x.reshape(-1, x.shape[-1]).float().split(_TOKENS_AT_ONCE):
            # The matrix is symmetric: what lies above the diagonal's blocks is not computed.
            for start in range(0, len(self._sum), _FEATURES_AT_ONCE):
                end = min(start + _FEATURES_AT_ONCE, len(self._sum))
                self._sum[start:end, :end] += rows[:, start:end].t() @ rows[:, :end]
            self._rows += len(rows)

    def matrix(self) -> Tensor:
        """float64 ``[in_features, in_features]``."""
        lower = self._sum.tril()
        return (lower + lower.tril(-1).t()) * (2 / max(self._rows, 1))


class Drift:
    """Mean of ``2 (x' - x) x^T`` over rows x and what they were, x', before layers ahead of them were quantised."""

    def __init__(self, in_features: int) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64)
        self._rows = 0

    def add(self, original: Tensor, x: Tensor) -> None:
        """Add the rows of ``[..., in_features]``."""
        originals, now = (t.reshape(-1, t.shape[-1]).float().split(_TOKENS_AT_ONCE) for t in (original, x))
        for before, rows in zip(originals, now, strict=True):
            self._sum += (before - rows).t() @ rows
            self._rows += len(rows)

    def matrix(self) -> Tensor:
        """float64 ``[in_features, in_features]``."""
        return self._sum * (2 / max(self._rows, 1))
