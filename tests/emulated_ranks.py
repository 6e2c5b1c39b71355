"""Several ranks with emulated GPUs in one process: their launches run at the same time, each rank's in their order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from collective_checks import sum_in_order
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

    def __init__(
        self, simt: ctypes.CDLL, world_size: int, timeout: float, registered_bytes: int, **options: int
    ) -> None:
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
                self._simt.simt_allow(
                    piece.begin, piece.end - piece.begin, piece.granule, piece.written, piece.name.encode()
                )
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


def collectives_are_right(library: Path, seed: int) -> bool:
    """Whether two and three ranks get what they should of every collective, in one shot and in two, and errors too."""
    try:
        for world_size in (2, 3):
            _check_results(library, seed, world_size)
        _check_errors(library, seed)
    except (AssertionError, RuntimeError):
        return False
    return True


# So small that few elements take several blocks and stretches, and both ways of adding up.
SMALL = {"slot_bytes": 512, "max_blocks": 3, "one_shot_bytes": 1500}


def _check_results(library: Path, seed: int, world_size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _check_results_of(library, seed, world_size, dtype)


def _check_results_of(library: Path, seed: int, world_size: int, dtype: torch.dtype) -> None:
    shapes = [(1, 576), (1, 7), (9, 40), (5, 37), (2, 96), (1, 300), (1, 193)]
    odd = torch.arange(SMALL["slot_bytes"] + 1).byte()  # a slot of bytes, and one more
    given = [[torch.randn(shape).to(dtype) for _ in range(world_size)] for shape in shapes]
    weights = [torch.randn(shape[1]).to(dtype) for shape in shapes]

    def calls(comm: tk.Communicator) -> list[list[torch.Tensor]]:
        results = []
        for number, (tensors, weight) in enumerate(zip(given, weights, strict=True)):
            x = tensors[comm.rank]
            place = comm.registered.view(dtype).view(2, -1)[number % 2, : x.numel()].view(x.shape)
            tk.rms_norm(x, weight, 1e-5, out=place)
            results.append(
                [
                    tk.all_reduce(x, comm),
                    *tk.all_reduce_rms_norm(x, tensors[0], weight, 1e-5, comm),
                    tk.reduce_scatter(torch.stack([x] * world_size), comm),
                    tk.all_gather(x, comm),
                    tk.broadcast(x, comm, root=number % world_size),
                    tk.all_reduce(place, comm),
                    *tk.all_reduce_rms_norm(place, tensors[0], weight, 1e-5, comm),
                    *tk.all_reduce_rms_norm(x, unaligned(tensors[0]), weight, 1e-5, comm),
                    *tk.all_reduce_rms_norm(x, tensors[0], unaligned(weight), 1e-5, comm),
                    tk.all_gather(odd + comm.rank, comm),
                    tk.broadcast(odd + comm.rank, comm, root=1),
                ]
            )
        return results

    with emulated_ranks(world_size, seed=seed, registered_bytes=1 << 14, library=library, **SMALL) as emulated:
        results = emulated.on_all(calls)
        emulated.run()
    with emulation(library):
        for number, (tensors, weight) in enumerate(zip(given, weights, strict=True)):
            total = sum_in_order(tensors)
            total_of_registered = sum_in_order([tk.rms_norm(x, weight, 1e-5) for x in tensors])
            normed = tk.fused_add_rms_norm(total, tensors[0], weight, 1e-5)
            expected = [
                total,
                *normed,
                total,
                torch.stack(tensors),
                tensors[number % world_size],
                total_of_registered,
                *tk.fused_add_rms_norm(total_of_registered, tensors[0], weight, 1e-5),
                *normed,
                *normed,
                torch.stack([odd + rank for rank in range(world_size)]),
                odd + 1,
            ]
            for of_rank in results:
                for pair in zip(of_rank[number], expected, strict=True):
                    assert torch.equal(*pair)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same where no vector begins."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def _check_errors(library: Path, seed: int) -> None:
    def differ(comm: tk.Communicator) -> None:
        tk.all_reduce(torch.ones(8 + comm.rank), comm)

    def without_one(comm: tk.Communicator) -> None:
        if comm.rank == 0:
            tk.all_reduce(torch.ones(8), comm)

    for calls, text in ((differ, "called another"), (without_one, "did not come")):
        with emulated_ranks(2, seed=seed, library=library, **SMALL) as emulated:
            emulated.on_all(calls)
            emulated.run()
            said = ""
            try:
                tk.all_reduce(torch.ones(8), emulated.comms[0])
            except tk.CommunicatorError as error:
                said = str(error)
            assert text in said


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
