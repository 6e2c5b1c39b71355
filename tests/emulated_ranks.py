"""Several ranks with emulated GPUs in one process: their launches run at the same time, each rank's in their order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from emulated_cuda import Piece, emulation, pieces_of, united

import teco_kernels as tk
from teco_kernels import _host
from teco_kernels.ops import _library
from teco_kernels.parallel.device_memory import DeviceMemoryTransport


class EmulatedRanks:
    """Ranks 0, 1, ... and a communicator of each.

    Attributes
    ----------
    comms : list of Communicator
    """

    def __init__(self, simt: ctypes.CDLL, world_size: int, timeout: float, registered_bytes: int, **options: int) -> None:
        natives = [
            _host.DeviceCommunicator(0, rank, world_size, timeout, registered_bytes, **options)
            for rank in range(world_size)
        ]
        for native in natives:
            native.connect([other.handle for other in natives])
        transports = [DeviceMemoryTransport(native, registered_bytes, torch.device("cpu")) for native in natives]
        self.comms = [
            tk.Communicator(transport, rank, world_size, timeout, "") for rank, transport in enumerate(transports)
        ]
        self._simt = simt
        self._forget()

    def _forget(self) -> None:
        self._pieces: list[list[Piece]] = [[] for _ in self.comms]
        self._kept: list[Any] = []
        self._launched = False

    def call(self, rank: int, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Put what the function launches in line, behind the earlier calls of the rank; its results come with `run`."""
        if not self._launched:
            self._simt.simt_begin_ranks(len(self.comms))
            self._launched = True
        self._simt.simt_set_rank(rank)

        def collect(operator: Any, arguments: tuple[Any, ...]) -> None:
            self._pieces[rank] += [piece for piece in pieces_of(operator, arguments) if not self._is_registered(piece)]
            self._kept.append(arguments)

        _library.record_calls(collect)
        return function(*args, **options)

    def on_all(self, function: Callable[[tk.Communicator], Any]) -> list[Any]:
        """What ``function(comm)`` gives on each rank."""
        return [self.call(rank, function, comm) for rank, comm in enumerate(self.comms)]

    def run(self) -> None:
        """Run all that was called; RuntimeError with a finding."""
        for rank, pieces in enumerate(self._pieces):
            self._simt.simt_set_rank(rank)
            for piece in united(pieces):
                self._simt.simt_allow(piece.begin, piece.end - piece.begin, piece.granule, piece.written, piece.name.encode())
        finding = self._simt.simt_run_ranks()
        self._forget()
        if finding:
            raise RuntimeError(finding.decode())

    def _is_registered(self, piece: Piece) -> bool:
        """Which all ranks have mapped, and need not be allowed."""
        return any(
            comm.registered.data_ptr() <= piece.begin < comm.registered.data_ptr() + comm.registered.nbytes
            for comm in self.comms
        )


@contextmanager
def emulated_ranks(
    world_size: int,
    *,
    seed: int = 0,
    timeout: float = 20.0,
    registered_bytes: int = 0,
    library: Path | None = None,
    **options: int,
) -> Iterator[EmulatedRanks]:
    """Ranks with emulated GPUs; `options` are those of `_host.DeviceCommunicator`."""
    with emulation(library, seed) as simt:
        simt.simt_run_ranks.restype = ctypes.c_char_p
        yield EmulatedRanks(simt, world_size, timeout, registered_bytes, **options)
