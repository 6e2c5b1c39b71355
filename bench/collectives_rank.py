"""One rank of one contestant of `bench/collectives.py`; told what to time through a named pipe.

Imports torch only where it is needed: ranks of OpenMPI run in an environment that has mpi4py and numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLOAT_BYTES = 4
HIDDEN_SIZE = 4096
# What one replay does; of the time it takes, each is a part.
CALLS_OF_PLAN = 16


class TecoRank:
    """This package, over shared memory."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        import torch

        self.group = GlooRank(rank, world_size, folder, name="teco")
        import teco_kernels
        from teco_kernels.ops import Plan

        self.torch, self.teco, self.plan = torch, teco_kernels, Plan
        self.comm = teco_kernels.Communicator.from_process_group()
        assert self.comm.backend == "shared_memory", self.comm.reason

    def call(self, case: str, num_bytes: int) -> Callable[[], Any]:
        count = num_bytes // FLOAT_BYTES
        # Of zeros: sums in place stay what they are.
        shape = (max(1, count // HIDDEN_SIZE), min(count, HIDDEN_SIZE))
        x, residual, out = (self.torch.zeros(shape) for _ in range(3))
        comm, all_reduce, fused = self.comm, self.teco.all_reduce, self.teco.all_reduce_rms_norm
        weight, sums = self.torch.ones(shape[1]), (x, residual)
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda: all_reduce(x, comm, out=out),
            "all_reduce, in place": lambda: all_reduce(x, comm, out=x),
            "all_reduce_rms_norm, in place": lambda: fused(x, residual, weight, 1e-5, comm, out=sums),
        }
        if case in calls:
            return calls[case]
        # As a decode step has them: recorded, and replayed without Python.
        call = calls[case.replace("native", "in place")]
        plan = self.plan(lambda: [call() for _ in range(CALLS_OF_PLAN)], keep_alive=(x, residual, weight))
        return plan.replay


class GlooRank:
    """torch.distributed's own."""

    def __init__(self, rank: int, world_size: int, folder: Path, name: str = "gloo") -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = dist.FileStore(str(folder / f"{name}.store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        self.torch, self.dist = torch, dist

    def call(self, case: str, num_bytes: int) -> Callable[[], Any]:
        x, all_reduce = self.torch.zeros(num_bytes // FLOAT_BYTES), self.dist.all_reduce
        return lambda: all_reduce(x)


class MpiRank:
    """OpenMPI through mpi4py, its buffers described beforehand."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        import numpy
        from mpi4py import MPI

        self.numpy, self.mpi = numpy, MPI

    def call(self, case: str, num_bytes: int) -> Callable[[], Any]:
        count = num_bytes // FLOAT_BYTES
        x = [self.numpy.ones(count, dtype=self.numpy.float32), self.mpi.FLOAT]
        out = [self.numpy.empty(count, dtype=self.numpy.float32), self.mpi.FLOAT]
        all_reduce = self.mpi.COMM_WORLD.Allreduce
        return lambda: all_reduce(x, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=("teco", "gloo", "mpi"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("world_size", type=int)
    parser.add_argument("--rank", type=int, default=int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
    options = parser.parse_args()
    # A core for each, as mpirun does; the same for all contestants.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[options.rank % len(cores)]})
    ranks = {"teco": TecoRank, "gloo": GlooRank, "mpi": MpiRank}
    rank = ranks[options.contestant](options.rank, options.world_size, options.folder)
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    pipe = options.folder / f"{options.contestant}.{options.rank}"
    with open(f"{pipe}.in") as asked, open(f"{pipe}.out", "w") as answers:
        for line in asked:
            case, num_bytes, repeats = json.loads(line)
            if (case, num_bytes) not in calls:
                calls[case, num_bytes] = rank.call(case, num_bytes)
            call, per_call = calls[case, num_bytes], CALLS_OF_PLAN if case.endswith("native") else 1
            repeats = -(-repeats // per_call)
            for _ in range(max(2, repeats // 10)):  # together, awake, and with warm caches
                call()
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            print(json.dumps((time.perf_counter() - started) / repeats / per_call), file=answers, flush=True)


if __name__ == "__main__":
    main()
