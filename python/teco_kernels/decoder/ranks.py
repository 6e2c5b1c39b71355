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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from teco_kernels import _host
from teco_kernels.decoder.loader import Source
from teco_kernels.decoder.rank import RankOptions
from teco_kernels.decoder.step_messages import StepMessages
from teco_kernels.parallel.collectives import all_gather
from teco_kernels.parallel.communicator import Communicator
from teco_kernels.parallel.shared_memory import SharedMemoryTransport

# Seconds that a worker gets to end by itself.
_GRACE = 5.0
# Of ranks that share memory, each in a segment of its own, see `Ranks`.
_COMMUNICATORS = ("comm", "messages", "loading")
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
    loading : Communicator
        To wait in, as long as it takes, until all have loaded their parts.
    processes : sequence of Popen
        Those that were started here: of ranks 1, 2, ...
    natives : sequence of _host.Communicator
        Of these, where their memory may still be open for others to join.
    leave : callable
        Destroys the process groups that were made for this.
    """

    comm: Communicator
    messages: StepMessages
    loading: Communicator
    processes: Sequence[subprocess.Popen[bytes]] = ()
    natives: Sequence[_host.Communicator] = ()
    leave: Callable[[], object] = lambda: None

    @classmethod
    def start(
        cls,
        path: Path,
        options: RankOptions,
        world_size: int,
        *,
        num_threads: int,
        registered_bytes: int,
        timeout: float,
    ) -> Ranks:
        """Start processes for all ranks but this one, which becomes rank 0.

        They end when it closes or ends, however that happens, and as soon as any other has ended. To be followed by
        `meet`.

        Raises
        ------
        CommunicatorError
            The ranks cannot share memory.
        """
        processes: list[subprocess.Popen[bytes]] = []
        try:
            sizes = (registered_bytes, 0, 0)
            segments = [_host.Segment.create(world_size, size) for size in sizes]
            command = [sys.executable, "-c", _WORKER, json.dumps([str(entry) for entry in sys.path])]
            for _ in range(world_size - 1):
                processes.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            pids = [os.getpid(), *(process.pid for process in processes)]
            for rank, process in enumerate(processes, start=1):
                settings = {
                    "rank": rank,
                    "pids": pids,
                    "segments": [(s.descriptor, s.token, size) for s, size in zip(segments, sizes, strict=True)],
                    "timeout": timeout,
                    "num_threads": num_threads,
                    "path": str(path),
                    "options": options.to_dict(),
                }
                assert process.stdin is not None
                try:
                    process.stdin.write(json.dumps(settings).encode() + b"\n")
                    process.stdin.flush()  # and left open: its end tells them of ours
                except BrokenPipeError:
                    raise OSError(f"rank {rank} has ended") from None
            timeouts = {"comm": timeout, "messages": timeout}
            return cls._over_memory(segments, sizes, 0, pids, timeouts, processes)
        except (RuntimeError, OSError) as error:
            _end_processes(processes)
            raise _host.CommunicatorError(f"starting {world_size} ranks of a model: {error}") from error
        except BaseException:
            _end_processes(processes)
            raise

    @classmethod
    def join(cls, segments: Sequence[tuple[int, int, int]], pids: Sequence[int], rank: int, timeout: float) -> Ranks:
        """In a process that `start` has started: join the others. What to pass is what `start` has sent."""
        opened, sizes = [], []
        for descriptor, token, size in segments:
            opened.append(_host.Segment.open(pids[0], descriptor, token, len(pids), size))
            sizes.append(size)
        # It waits for messages for as long as rank 0 lives.
        return cls._over_memory(opened, sizes, rank, pids, {"comm": timeout}, ())

    @classmethod
    def _over_memory(
        cls,
        segments: Sequence[_host.Segment],
        sizes: Sequence[int],
        rank: int,
        pids: Sequence[int],
        timeouts: dict[str, float],
        processes: Sequence[subprocess.Popen[bytes]],
    ) -> Ranks:
        comms, natives = {}, []
        for name, segment, size in zip(_COMMUNICATORS, segments, sizes, strict=True):
            timeout = timeouts.get(name, math.inf)
            natives.append(_host.Communicator(segment, rank, pids, timeout))
            comms[name] = Communicator(SharedMemoryTransport(natives[-1], size), rank, len(pids), timeout, "")
        return cls(comms["comm"], StepMessages(comms["messages"]), comms["loading"], processes, natives)

    @classmethod
    def find(cls, world_size: int, *, registered_bytes: int, timeout: float) -> Ranks | None:
        """The ranks of the default process group, or of torchrun, which is then made; None when there are none.

        Raises
        ------
        ValueError
            There are more or fewer than `world_size`.
        """
        if is_own := not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                return None
            dist.init_process_group("gloo")
        if (found := dist.get_world_size()) != world_size:
            raise ValueError(
                f"tensor_parallel_size: expected {found}, the ranks of the default process group, got {world_size}"
            )
        comm = Communicator.from_process_group(timeout=timeout, registered_bytes=registered_bytes)
        # Workers wait for as long as rank 0 lives; how long it waits for them is another thing.
        group = dist.new_group(timeout=timedelta(days=365))
        patience = timeout if dist.get_rank() == 0 else math.inf
        messages = StepMessages(Communicator.from_process_group(group, timeout=patience))
        loading = Communicator.from_process_group(group, timeout=math.inf)
        # Without a group, all are destroyed.
        return cls(comm, messages, loading, leave=lambda: dist.destroy_process_group(None if is_own else group))

    def check_alike(self, source: Source, options: RankOptions) -> None:
        """Raise ValueError, on every rank, where ranks were given other options or another model."""
        own = torch.tensor([zlib.crc32(json.dumps(options.to_dict(), sort_keys=True).encode()), source.fingerprint()])
        for name, everyone in zip(("arguments", "model"), all_gather(own, self.comm).t().tolist(), strict=True):
            if (odd := next((rank for rank, other in enumerate(everyone) if other != everyone[0]), None)) is not None:
                raise ValueError(f"LLM: expected the same {name} on every rank, rank {odd} differs from rank 0")

    def meet(self) -> None:
        """Wait until all ranks have loaded their parts; CommunicatorError when one ends before."""
        all_gather(torch.zeros(1), self.loading)
        for native in self.natives:
            native.close_descriptor()

    def end(self) -> None:
        """Let the other ranks end, and wait for those that were started here; on these, leave."""
        if not self.processes:
            with contextlib.suppress(_host.CommunicatorError):  # they know
                if self.comm.rank == 0:
                    self.messages.send_end()
                all_gather(torch.zeros(1), self.comm)  # all have heard it
        for comm in (self.messages.comm, self.comm, self.loading):
            comm.close()
        _end_processes(self.processes)
        with contextlib.suppress(RuntimeError):  # of ranks that are gone
            self.leave()

    def end_with(self, owner: object) -> weakref.finalize:  # type: ignore[type-arg]
        """Call `end` once: when the result is called, when `owner` is gone, or at exit; in no forked child."""
        return weakref.finalize(owner, _in_process(os.getpid(), self.end))


def _in_process(pid: int, function: Callable[[], object]) -> Callable[[], object]:
    return lambda: function() if os.getpid() == pid else None


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
