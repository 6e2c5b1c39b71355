"""Ranks that share a model: started here, or found, as torchrun has started them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from teco_kernels import _host
from teco_kernels.decoder.rank import RankOptions
from teco_kernels.decoder.step_messages import StepMessages
from teco_kernels.parallel.collectives import all_gather
from teco_kernels.parallel.communicator import Communicator
from teco_kernels.parallel.shared_memory import SharedMemoryTransport

# Seconds that a worker gets to end by itself.
_GRACE = 5.0
_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from teco_kernels.decoder.worker import main; main()"
)


@dataclass(frozen=True)
class Ranks:
    """How this rank reaches the others.

    Attributes
    ----------
    comm : Communicator
        For the steps.
    messages : StepMessages
        Over a communicator of its own: between steps there may be hours.
    processes : sequence of Popen
        Those that were started here: of ranks 1, 2, ...
    """

    comm: Communicator
    messages: StepMessages
    processes: Sequence[subprocess.Popen[bytes]] = ()

    @classmethod
    def start(cls, path: Path, options: RankOptions, world_size: int, num_threads: int, timeout: float) -> Ranks:
        """Start processes for all ranks but this one, which becomes rank 0.

        They end when it closes or ends, however that happens, and as soon as any other has ended.

        Raises
        ------
        CommunicatorError
            A process has ended at once, or the ranks cannot share memory.
        """
        processes: list[subprocess.Popen[bytes]] = []
        try:
            # For the steps, and for messages.
            segments = [_host.Segment.create(world_size) for _ in range(2)]
            command = [sys.executable, "-c", _WORKER, json.dumps([str(entry) for entry in sys.path])]
            for _ in range(world_size - 1):
                processes.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            pids = [os.getpid(), *(process.pid for process in processes)]
            for rank, process in enumerate(processes, start=1):
                settings = {
                    "rank": rank,
                    "pids": pids,
                    "segments": [(segment.descriptor, segment.token) for segment in segments],
                    "timeout": timeout,
                    "num_threads": num_threads,
                    "path": str(path),
                    "options": options.to_dict(),
                }
                assert process.stdin is not None
                process.stdin.write(json.dumps(settings).encode() + b"\n")
                process.stdin.flush()  # and left open: its end tells them of ours
            natives = [_host.Communicator(segment, 0, pids, timeout) for segment in segments]
            comms = [_over_memory(native, 0, world_size, timeout) for native in natives]
            for comm in comms:
                meet(comm)
            for native in natives:
                native.close_descriptor()
        except (RuntimeError, OSError) as error:
            _end_processes(processes)
            raise _host.CommunicatorError(f"starting {world_size} ranks of a model: {error}") from error
        except BaseException:
            _end_processes(processes)
            raise
        return cls(comms[0], StepMessages(comms[1]), processes)

    @classmethod
    def join(
        cls, segments: Sequence[tuple[int, int]], pids: Sequence[int], rank: int, timeout: float
    ) -> Ranks:
        """In a process that `start` has started: join the others. What to pass is what `start` has sent."""
        world_size = len(pids)
        # It waits for messages for as long as rank 0 lives.
        comms = [
            _over_memory(
                _host.Communicator(_host.Segment.open(pids[0], descriptor, token, world_size), rank, pids, patience),
                rank,
                world_size,
                patience,
            )
            for (descriptor, token), patience in zip(segments, (timeout, math.inf), strict=True)
        ]
        for comm in comms:
            meet(comm)
        return cls(comms[0], StepMessages(comms[1]))

    @classmethod
    def find(cls, world_size: int, timeout: float) -> Ranks | None:
        """The ranks of the default process group, or of torchrun, which is then made; None when there are none.

        Raises
        ------
        ValueError
            There are more or fewer than `world_size`.
        """
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                return None
            dist.init_process_group("gloo")
        if (found := dist.get_world_size()) != world_size:
            raise ValueError(
                f"tensor_parallel_size: expected {found}, the ranks of the default process group, got {world_size}"
            )
        comm = Communicator.from_process_group(timeout=timeout)
        # Workers wait for as long as rank 0 lives; how long it waits for them is another thing.
        group = dist.new_group(timeout=timedelta(days=365))
        patience = timeout if dist.get_rank() == 0 else math.inf
        return cls(comm, StepMessages(Communicator.from_process_group(group, timeout=patience)))

    def check_options(self, options: RankOptions) -> None:
        """Raise ValueError, on every rank, where ranks were given different ones."""
        own = zlib.crc32(json.dumps(options.to_dict(), sort_keys=True).encode())
        everyone = all_gather(torch.tensor([own]), self.comm).flatten().tolist()
        if (odd := next((rank for rank, other in enumerate(everyone) if other != everyone[0]), None)) is not None:
            raise ValueError(f"LLM: expected the same arguments on every rank, got others on rank {odd} than on rank 0")

    def end(self) -> None:
        """Let the other ranks end, and wait for those that were started here."""
        if not self.processes:
            with contextlib.suppress(_host.CommunicatorError):  # they know
                self.messages.send_end()
        self.messages.close()
        self.comm.close()
        _end_processes(self.processes)

    def end_with(self, owner: object) -> weakref.finalize:  # type: ignore[type-arg]
        """Call `end` once: when the result is called, when `owner` is gone, or at exit."""
        return weakref.finalize(owner, self.end)


def _over_memory(native: _host.Communicator, rank: int, world_size: int, timeout: float) -> Communicator:
    return Communicator(SharedMemoryTransport(native), rank, world_size, timeout, "")


def meet(comm: Communicator) -> None:
    """Wait for all ranks."""
    all_gather(torch.zeros(1), comm)


def _end_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
    for process in processes:
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
