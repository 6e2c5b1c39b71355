"""The cases of every operator family."""

from __future__ import annotations

from collections.abc import Iterator

from teco_kernels.testing.case import Case
from teco_kernels.testing.cases import activation, attention, cache, embedding, matmul, norm, rotary, sampling

FAMILIES = (embedding, norm, activation, matmul, rotary, cache, attention, sampling)


def all_cases() -> Iterator[Case]:
    """Every case of every operator."""
    for family in FAMILIES:
        yield from family.cases()
