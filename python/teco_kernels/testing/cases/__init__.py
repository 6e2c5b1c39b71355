"""The cases of every operator family."""

from __future__ import annotations

from collections.abc import Iterator

from teco_kernels.testing.case import Case
from teco_kernels.testing.cases import (
    activation,
    attention,
    cache,
    collectives,
    embedding,
    matmul,
    norm,
    recycle,
    rotary,
    sampling,
    verify,
)

FAMILIES = (embedding, norm, activation, matmul, rotary, cache, attention, sampling, recycle, verify, collectives)


def all_cases() -> Iterator[Case]:
    """Every case of every operator."""
    for family in FAMILIES:
        yield from family.cases()
