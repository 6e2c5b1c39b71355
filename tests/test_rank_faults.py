"""What happens when a rank fails, stays away, or does something else than the others."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

import teco_kernels as tk
from teco_kernels.ops import collectives
from teco_kernels.parallel.process_group import ProcessGroupTransport

pytestmark = pytest.mark.usefixtures("nothing_left_in_shared_memory")

# For ranks that wait in vain; connecting must not take longer.
SHORT = 2.0


# ---- ranks that do not do the same


def different_calls(comm: tk.Communicator, how: str) -> str:
    x = torch.ones(100)
    tk.all_reduce(x, comm)
    odd = comm.rank == comm.world_size - 1
    started = time.monotonic()
    try:
        if how == "size":
            tk.all_reduce(x[: 99 if odd else 100], comm)
        elif how == "large":
            tk.all_reduce(torch.ones(1_000_000 if odd else 10), comm)
        elif how == "dtype":
            tk.all_reduce(x.half() if odd else x, comm)
        elif how == "root":
            tk.broadcast(x, comm, root=int(odd))
        elif how == "rows":
            x = x.view(10, 10) if odd else x.view(20, 5)
            tk.all_reduce_rms_norm(x, x, x[0].clone(), 1e-5, comm)
        elif how == "order":
            collectives = (tk.all_reduce, tk.all_gather)
            for collective in reversed(collectives) if odd else collectives:
                collective(x, comm)
        elif how == "twice":
            for _ in range(2 if odd else 1):
                tk.all_reduce(x, comm)
            if not odd:
                comm.close()
                tk.all_reduce(x, comm)
    except tk.CommunicatorError as error:
        assert time.monotonic() - started < 10
        with pytest.raises(tk.CommunicatorError):
            tk.all_reduce(x, comm)
        return str(error)
    return "no error"


@pytest.mark.parametrize("how", ["size", "large", "dtype", "root", "rows", "order"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_different_calls_are_an_error_on_every_rank(how: str, world_size: int) -> None:
    with ranks.start(different_calls, world_size, how) as running:
        for error in running.results():
            assert "called" in error, error
        assert running.join() == [0] * world_size


def test_a_closed_communicator_is_an_error_for_the_others() -> None:
    with ranks.start(different_calls, 2, "twice") as running:
        for error in running.results():
            assert "rank 0 has closed its communicator" in error


def wait_for_end(comm: tk.Communicator) -> None:
    """Until the others have given this rank up."""
    deadline = time.monotonic() + ranks.PATIENCE
    while not comm.transport._native.ended and time.monotonic() < deadline:  # type: ignore[attr-defined]
        time.sleep(0.01)


def stays_away(comm: tk.Communicator, how: str) -> str:
    tk.all_reduce(torch.ones(1), comm)
    if comm.rank == 1:
        if how == "sleeps":
            wait_for_end(comm)
        else:
            os.kill(os.getpid(), signal.SIGSTOP)
    started = time.monotonic()
    try:
        tk.all_reduce(torch.ones(1), comm)
    except tk.CommunicatorError as error:
        assert time.monotonic() - started < SHORT + 5  # where others have the cores meanwhile
        return str(error)
    return "no error"


@pytest.mark.parametrize("how", ["sleeps", "stops"])
def test_a_rank_that_stays_away_is_an_error_within_the_timeout(how: str) -> None:
    with ranks.start(stays_away, 3, how, timeout=SHORT) as running:
        if how == "stops":
            pid = running.processes[1].pid
            assert pid is not None
            for survivor in (0, 2):
                assert "rank 1 did not come" in running.result(survivor)
            assert "State:\tT" in Path(f"/proc/{pid}/status").read_text()
            os.kill(pid, signal.SIGCONT)
        for error in running.results():
            assert "rank 1 did not come within 2 s" in error
        assert running.join() == [0, 0, 0]


def interrupted(comm: tk.Communicator) -> str:
    if comm.rank == 0:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            tk.all_reduce(torch.ones(1), comm)
    else:
        wait_for_end(comm)
    with pytest.raises(tk.CommunicatorError, match="rank 0 was interrupted") as error:
        tk.all_reduce(torch.ones(1), comm)
    return str(error.value)


def test_waiting_hears_signals() -> None:
    with ranks.start(interrupted, 2) as running:
        assert all("rank 0 was interrupted" in error for error in running.results())


def forks(comm: tk.Communicator) -> float:
    child = os.fork()
    if child == 0:
        try:
            tk.all_reduce(torch.ones(1), comm)
        except tk.CommunicatorError as error:
            comm.close()
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    return tk.all_reduce(torch.ones(1), comm).item()


def test_a_forked_child_takes_no_part_and_closes_nothing() -> None:
    assert ranks.run(forks, 2) == [2.0, 2.0]


# ---- ranks that die


def reduce_for_ever(comm: tk.Communicator, size: int) -> None:
    x = torch.ones(size)
    while True:
        tk.all_reduce(x, comm, out=x)


def kill_one(size: int, world_size: int, delay: float, victim: int) -> None:
    with ranks.start(reduce_for_ever, world_size, size, timeout=20.0) as running:
        running.wait_for_group()
        time.sleep(delay)
        running.processes[victim].kill()
        killed = time.monotonic()
        results = running.results(patience=15)
        assert time.monotonic() - killed < 10
        for rank, result in enumerate(results):
            if rank == victim:
                assert result is ranks.KILLED
            else:
                assert isinstance(result, tk.CommunicatorError), result
        codes = running.join(patience=15)
        assert codes == [-signal.SIGKILL if rank == victim else 0 for rank in range(world_size)]


@pytest.mark.parametrize(("size", "world_size"), [(1000, 2), (4 << 20, 3)])
def test_a_killed_rank_is_an_error_for_the_others(size: int, world_size: int) -> None:
    kill_one(size, world_size, delay=0.5, victim=1)


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.01])
def test_a_rank_may_be_killed_while_they_connect(delay: float) -> None:
    kill_one(1000, 2, delay, victim=0)


@pytest.mark.stress
def test_two_hundred_random_kills() -> None:
    draw = random.Random(11)
    for _ in range(200):
        world_size = draw.choice((2, 2, 3, 4))
        delay = draw.choice((0.0, 0.01, 0.5)) * draw.random()
        kill_one(draw.choice((1, 1000, 100_000, 1 << 20)), world_size, delay, draw.randrange(world_size))


# ---- arguments


@pytest.fixture
def alone() -> Any:
    """A communicator of this process only."""
    with tk.Communicator.alone() as comm:
        yield comm


def check_bad_arguments(comm: tk.Communicator) -> None:
    x = torch.ones(4, 6)
    with pytest.raises(TypeError, match="input: expected dtype float32, float16, bfloat16, got int64"):
        tk.all_reduce(x.long(), comm)
    with pytest.raises(ValueError, match="input: expected a contiguous tensor"):
        tk.all_reduce(x.t(), comm)
    with pytest.raises(ValueError, match=r"out: expected .*shape.* \[4, 6\], got \[6\]"):
        tk.all_reduce(x, comm, out=x[0])
    with pytest.raises(TypeError, match=r"out: expected .*dtype"):
        tk.all_reduce(x, comm, out=x.half())
    with pytest.raises(ValueError, match="out: expected memory apart"):
        tk.all_reduce(x[:3], comm, out=x[1:])
    with pytest.raises(ValueError, match=r"weight: expected shape .*hidden_size"):
        tk.all_reduce_rms_norm(x, x.clone(), torch.ones(5), 1e-5, comm)
    with pytest.raises(ValueError, match=r"residual: expected .*shape.* \[4, 6\]"):
        tk.all_reduce_rms_norm(x, x[:3].clone(), torch.ones(6), 1e-5, comm)
    with pytest.raises(ValueError, match="residual_out: expected memory apart"):
        tk.all_reduce_rms_norm(x, x.clone(), torch.ones(6), 1e-5, comm, out=(x, x))
    with pytest.raises(ValueError, match=r"input: expected shape \[1, ...\], a row per rank, got \[4, 6\]"):
        tk.reduce_scatter(x, comm)
    with pytest.raises(ValueError, match=r"out: expected shape \[1, 4, 6\]"):
        tk.all_gather(x, comm, out=x)
    with pytest.raises(ValueError, match=r"root: expected a rank of 0 to 0, got 1"):
        tk.broadcast(x, comm, root=1)


def bad_arguments_over_a_group(comm: tk.Communicator) -> None:
    check_bad_arguments(tk.Communicator(ProcessGroupTransport(dist.group.WORLD, 20.0), 0, 1, 20.0, "asked"))


def test_bad_arguments_are_named_over_a_group_too() -> None:
    ranks.run(bad_arguments_over_a_group, 1)


def test_bad_arguments_are_named(alone: tk.Communicator) -> None:
    check_bad_arguments(alone)
    with pytest.raises(ValueError, match="comm: there is no communicator with number 0"):
        collectives.all_reduce(torch.ones(1), torch.ones(1), 0)
    with pytest.raises(ValueError, match="timeout: expected a positive number of seconds, got 0"):
        tk.Communicator.from_process_group(timeout=0)
    with pytest.raises(ValueError, match="group: expected a process group"):
        tk.Communicator.from_process_group()
