"""Many ranks: a communicator, and the collectives over it."""

from __future__ import annotations

from teco_kernels._host import CommunicatorError
from teco_kernels.parallel.collectives import (
    all_gather,
    all_reduce,
    all_reduce_rms_norm,
    broadcast,
    reduce_scatter,
)
from teco_kernels.parallel.communicator import Communicator

__all__ = [
    "Communicator",
    "CommunicatorError",
    "all_gather",
    "all_reduce",
    "all_reduce_rms_norm",
    "broadcast",
    "reduce_scatter",
]
