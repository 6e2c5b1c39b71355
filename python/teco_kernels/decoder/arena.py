"""The memory of a step's intermediate results: planned once by their lifetimes, at addresses that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Results begin at cache lines.
_ALIGNMENT = 64


class Intermediate(NamedTuple):
    """What a step computes and soon needs no more.

    Attributes
    ----------
    name : str
    columns : int
        Numbers per token.
    first, last : int
        Of the operations of a layer, the one that writes it and the last one that it must outlive.
    """

    name: str
    columns: int
    first: int
    last: int

    def overlaps(self, other: Intermediate) -> bool:
        """Whether there is a time at which both are needed."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class ArenaPlan:
    """Where in an arena each intermediate result lies.

    Attributes
    ----------
    intermediates : tuple of Intermediate
    offsets : tuple of int
        Bytes per token of the arena before each.
    sizes : tuple of int
        Bytes per token of each.
    """

    intermediates: tuple[Intermediate, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def make(cls, intermediates: Sequence[Intermediate], dtype: torch.dtype) -> ArenaPlan:
        """Largest first, each at the lowest place that is free for as long as it lives."""
        sizes = [-(-item.columns * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for item in intermediates]
        offsets: dict[int, int] = {}
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            taken = sorted(
                (offsets[other], offsets[other] + sizes[other])
                for other in offsets
                if intermediates[index].overlaps(intermediates[other])
            )
            offset = 0
            for begin, end in taken:
                if offset + sizes[index] <= begin:
                    break
                offset = max(offset, end)
            offsets[index] = offset
        return cls(tuple(intermediates), tuple(offsets[i] for i in range(len(sizes))), tuple(sizes))

    @property
    def bytes_per_token(self) -> int:
        """Of the arena."""
        return max((offset + size for offset, size in zip(self.offsets, self.sizes, strict=True)), default=0)

    @property
    def bytes_per_token_apart(self) -> int:
        """What it would take if no two results shared memory."""
        return sum(self.sizes)

    def place(self, memory: Tensor, num_tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Views ``[num_tokens, columns]`` of `memory`, uint8 ``[num_tokens * bytes_per_token]``, by name."""
        views = {}
        for item, offset, size in zip(self.intermediates, self.offsets, self.sizes, strict=True):
            rows = memory[offset * num_tokens : (offset + size) * num_tokens].view(dtype)
            views[item.name] = rows[: num_tokens * item.columns].view(num_tokens, item.columns)
        return views

    def __str__(self) -> str:
        lines = [f"{'result':<18}{'bytes per token':>16}{'at':>9}{'operations':>12}"]
        for item, offset, size in zip(self.intermediates, self.offsets, self.sizes, strict=True):
            lines.append(f"{item.name:<18}{size:>16}{offset:>9}{f'{item.first} to {item.last}':>12}")
        lines.append(f"{'all':<18}{self.bytes_per_token:>16}   (apart: {self.bytes_per_token_apart})")
        return "\n".join(lines)
