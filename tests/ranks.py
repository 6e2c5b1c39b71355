"""Runs a function on several ranks, each a process with a communicator.

The processes are forked from a server that has imported everything, and none lives longer than the `with` block.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import teco_kernels as tk

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ranks", "teco_kernels.parallel"])

#: The result of a rank that ended without one.
KILLED = "killed"
_JOINED = "has its group"
#: Of what goes wrong in a test; a rank that has not answered by then hangs.
PATIENCE = 60.0


class Ranks:
    """Running ranks.

    Attributes
    ----------
    processes : list
        One per rank.
    """

    def __init__(self, world_size: int) -> None:
        self.processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._results: dict[int, Any] = {}
        self.world_size = world_size

    def wait_for_group(self) -> None:
        """Until the ranks have their Gloo group, and begin to connect a communicator."""
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(PATIENCE), f"rank {rank} hangs"
            assert pipe.recv() == _JOINED

    def result(self, rank: int, patience: float = PATIENCE) -> Any:
        """What a rank returned, or the error that it met."""
        while rank not in self._results:
            pipe = self._pipes[rank]
            assert pipe.poll(max(0.0, patience)), f"rank {rank} hangs"
            try:
                result = pipe.recv()
            except EOFError:
                result = KILLED
            if not (isinstance(result, str) and result == _JOINED):
                self._results[rank] = result
        return self._results[rank]

    def results(self, patience: float = PATIENCE) -> list[Any]:
        """Those of all ranks."""
        deadline = time.monotonic() + patience
        return [self.result(rank, deadline - time.monotonic()) for rank in range(self.world_size)]

    def join(self, patience: float = PATIENCE) -> list[int | None]:
        """Exit codes, once all have ended."""
        deadline = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]


@contextlib.contextmanager
def start(program: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> Iterator[Ranks]:
    """Start ``program(comm, *args)`` on so many ranks; `options` go to `Communicator.from_process_group`."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(world_size)
        try:
            for rank in range(world_size):
                ours, theirs = _CONTEXT.Pipe(duplex=False)
                process = _CONTEXT.Process(
                    target=_main, args=(Path(folder), rank, world_size, theirs, program, args, options)
                )
                process.start()
                theirs.close()
                ranks.processes.append(process)
                ranks._pipes.append(ours)
            yield ranks
        finally:
            for process in ranks.processes:
                if process.exitcode is None:
                    process.join(1.0)
                if process.exitcode is None:
                    process.kill()
                    process.join()


def run(program: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> list[Any]:
    """Results of all ranks; the first error of any is raised."""
    with start(program, world_size, *args, **options) as ranks:
        results = ranks.results()
        for rank, result in enumerate(results):
            assert result is not KILLED, f"rank {rank} died"
            if isinstance(result, Exception):
                raise result
        assert ranks.join() == [0] * world_size
        return results


def join_group(folder: Path, rank: int, world_size: int) -> None:
    """Make the Gloo group of the test's ranks."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE))


def _main(
    folder: Path,
    rank: int,
    world_size: int,
    pipe: Connection,
    program: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    join_group(folder, rank, world_size)
    pipe.send(_JOINED)
    try:
        with tk.Communicator.from_process_group(dist.group.WORLD, **{"timeout": 20.0, **options}) as comm:
            answer = program(comm, *args)
    except Exception as error:
        answer = error
    pipe.send(answer)
    pipe.close()
    with contextlib.suppress(RuntimeError):  # of peers that are gone
        dist.destroy_process_group()
