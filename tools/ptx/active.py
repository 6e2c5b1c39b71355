"""Sets of the threads of a block."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ptx.types import Array

WARP = 32


class Active:
    """The threads that execute an instruction.

    Parameters
    ----------
    mask : array of bool [threads]
        Of whole warps: the last one of a block has threads that do not exist.
    """

    def __init__(self, mask: Array) -> None:
        self.mask = mask

    @cached_property
    def is_all(self) -> bool:
        """Whether it is every one."""
        return bool(self.mask.all())

    @cached_property
    def index(self) -> Array:
        """Numbers of the threads."""
        return np.flatnonzero(self.mask)

    @cached_property
    def by_warp(self) -> Array:
        """The mask as [warps, 32]."""
        return self.mask.reshape(-1, WARP)

    @cached_property
    def whole_warps(self) -> bool:
        """Whether every warp has all of its threads here, or none."""
        lanes = self.by_warp.sum(1)
        return bool(((lanes == WARP) | (lanes == 0)).all())

    def __and__(self, predicate: Array) -> Active:
        """Those of them for which it holds."""
        return Active(self.mask & predicate)

    def without(self, other: Active) -> Active:
        """Those of them that are not among the others."""
        return Active(self.mask & ~other.mask)

    def __or__(self, other: Active) -> Active:
        return Active(self.mask | other.mask)

    def __bool__(self) -> bool:
        return bool(self.mask.any())
