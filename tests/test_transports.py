"""What carries collectives: shared memory, a process group, both; each gives the same bits."""

from __future__ import annotations

import os
import signal
import stat

import pytest
import ranks
import torch
import torch.distributed as dist
from collective_checks import DTYPES, check_copies, check_norms, check_sums, of_rank, sum_in_order

import teco_kernels as tk
from teco_kernels import _host
from teco_kernels.parallel import process_group, shared_memory
from teco_kernels.parallel.process_group import ProcessGroupTransport

pytestmark = pytest.mark.usefixtures("nothing_left_in_shared_memory")


# ---- without shared memory


def same_over_the_group(comm: tk.Communicator) -> str:
    group = tk.Communicator(ProcessGroupTransport(dist.group.WORLD, 20.0), comm.rank, comm.world_size, 20.0, "asked")
    check_copies(group)
    check_norms(group)
    for count in (0, 1, 1000, process_group.ONE_SHOT_BYTES // 4 + 1, 100_003):
        x = of_rank(comm.rank, (count,), torch.float32)
        assert torch.equal(tk.all_reduce(x, group), tk.all_reduce(x, comm))
        check_sums(group, count, torch.float16, 0)
    return group.backend


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_group_gives_the_same_bits(world_size: int) -> None:
    assert ranks.run(same_over_the_group, world_size) == ["process_group"] * world_size


def refused_memory(comm: tk.Communicator, how: str) -> tuple[str, str]:
    if comm.rank == 1:
        if how == "host":
            shared_memory._host_identity = lambda: "another host"  # type: ignore[assignment]
        elif how == "system":
            shared_memory.problem_here = lambda: "no memfd"  # type: ignore[assignment]
        else:
            shared_memory._host = _WithoutOpen  # type: ignore[assignment]
    with tk.Communicator.from_process_group(dist.group.WORLD, timeout=20.0) as other:
        assert tk.all_reduce(torch.ones(3), other).tolist() == [2.0, 2.0, 2.0]
        return other.backend, other.reason


class _WithoutOpen:
    MAX_RANKS, Communicator = _host.MAX_RANKS, _host.Communicator

    class Segment:
        create = _host.Segment.create

        @staticmethod
        def open(*args: int) -> None:
            raise RuntimeError("Permission denied")


@pytest.mark.parametrize(
    ("how", "reason"),
    [("host", "several hosts"), ("system", "rank 1: no memfd"), ("open", "rank 1: Permission denied")],
)
def test_where_memory_cannot_be_shared_all_ranks_use_the_group(how: str, reason: str) -> None:
    for backend, said in ranks.run(refused_memory, 2, how):
        assert backend == "process_group"
        assert reason in said


# ---- several hosts


def on_hosts(comm: tk.Communicator, hosts: list[int], count: int) -> tuple[str, str]:
    """`hosts`: where each rank is. Checks all collectives, with sums host by host."""
    shared_memory._host_identity = lambda: f"host {hosts[comm.rank]}"  # type: ignore[assignment]
    with tk.Communicator.from_process_group(dist.group.WORLD, timeout=20.0, registered_bytes=64) as other:
        assert len(other.registered) == 64
        for dtype in DTYPES:
            everyone = [of_rank(rank, (count,), dtype) for rank in range(comm.world_size)]
            by_host = [
                sum_in_order([x.float() for x, host in zip(everyone, hosts, strict=True) if host == number])
                for number in dict.fromkeys(hosts)
            ]
            if other.backend == "hierarchy":
                assert torch.equal(tk.all_reduce(everyone[comm.rank], other), sum_in_order(by_host).to(dtype))
                rows = torch.stack([everyone[comm.rank]] * comm.world_size)
                assert torch.equal(tk.reduce_scatter(rows, other), sum_in_order(by_host).to(dtype))
        check_copies(other)
        check_norms(other)
        return other.backend, other.reason


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]])
def test_ranks_of_several_hosts_share_memory_within_each(hosts: list[int]) -> None:
    for backend, reason in ranks.run(on_hosts, 4, hosts, 5000):
        assert backend == "hierarchy"
        assert "several hosts" in reason


@pytest.mark.parametrize("hosts", [[0, 0, 1], [0, 1, 2]])
def test_uneven_hosts_use_the_group(hosts: list[int]) -> None:
    for backend, reason in ranks.run(on_hosts, 3, hosts, 10):
        assert backend == "process_group"
        assert ("not as many on each" in reason) == (hosts == [0, 0, 1])


def dies_on_a_host(comm: tk.Communicator, dying: int) -> str:
    shared_memory._host_identity = lambda: f"host {comm.rank // 2}"  # type: ignore[assignment]
    other = tk.Communicator.from_process_group(dist.group.WORLD, timeout=3.0)
    assert other.backend == "hierarchy"
    tk.all_reduce(torch.ones(3), other)
    if comm.rank == dying:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            tk.all_reduce(torch.ones(3), other)
    except tk.CommunicatorError as error:
        return str(error)


@pytest.mark.parametrize("dying", [2, 3])
def test_a_death_on_one_host_is_an_error_on_all(dying: int) -> None:
    """Of a leader, and of another rank."""
    with ranks.start(dies_on_a_host, 4, dying) as started:
        results = started.results(patience=30.0)
    assert results.pop(dying) == ranks.KILLED
    assert all(isinstance(result, str) for result in results), results


def test_more_ranks_than_share_memory_in_all() -> None:
    for backend, _ in ranks.run(on_hosts, 10, [0] * 5 + [1] * 5, 40):
        assert backend == "hierarchy"


def test_memory_has_no_name_and_is_the_users_own() -> None:
    segment = _host.Segment.create(2)
    status = os.fstat(segment.descriptor)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0
    with pytest.raises(PermissionError):
        os.ftruncate(segment.descriptor, 0)
    with pytest.raises(RuntimeError, match="another segment"):
        _host.Segment.open(os.getpid(), segment.descriptor, segment.token ^ 1, 2)
    with pytest.raises(RuntimeError, match="something else"):
        _host.Segment.open(os.getpid(), segment.descriptor, segment.token, 3)
