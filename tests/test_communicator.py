"""Collectives of several ranks: results to the bit, and what happens when a rank fails or does something else."""

from __future__ import annotations

import gc
import os
import random
import signal
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

import teco_kernels as tk
from teco_kernels import _host
from teco_kernels.ops import Plan, collectives
from teco_kernels.parallel import process_group, shared_memory
from teco_kernels.parallel.process_group import ProcessGroupTransport

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# For ranks that wait in vain; connecting must not take longer.
SHORT = 2.0


def of_rank(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """What a rank gives; all ranks know what the others give, to check what they get."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def sum_in_order(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].float()
    for tensor in tensors[1:]:
        total = total + tensor.float()
    return total.to(tensors[0].dtype)


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> Any:
    def names() -> set[str]:  # but for the semaphores of Python's multiprocessing: any program may have those
        return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}

    before = names()
    yield
    assert names() <= before


# ---- results


def sizes(world_size: int, dtype: torch.dtype) -> list[int]:
    """None, one, odd ones, a slot and more, and those around which another way is taken."""
    slot = (256 << 10) // dtype.itemsize
    border = _host.Communicator.one_shot_bytes(world_size) // dtype.itemsize
    around = [border - 1, border, border + 1] if world_size > 2 else []
    return [0, 1, 7, 8, 33, 4096, *around, slot - 1, slot, slot + 1, 3 * slot + 5]


def check_collectives(comm: tk.Communicator) -> str:
    for dtype in DTYPES:
        for seed, count in enumerate(sizes(comm.world_size, dtype)):
            check_sums(comm, count, dtype, seed)
    check_copies(comm)
    check_norms(comm)
    return comm.backend


def check_sums(comm: tk.Communicator, count: int, dtype: torch.dtype, seed: int) -> None:
    everyone = [of_rank(rank, (count,), dtype, seed) for rank in range(comm.world_size)]
    mine, expected = everyone[comm.rank], sum_in_order(everyone)
    assert torch.equal(tk.all_reduce(mine, comm), expected), (dtype, count)
    in_place = mine.clone()
    assert tk.all_reduce(in_place, comm, out=in_place) is in_place
    assert torch.equal(in_place, expected), (dtype, count)
    rows = [torch.stack([(row + 1) * x for row in range(comm.world_size)]) for x in everyone]
    assert torch.equal(tk.reduce_scatter(rows[comm.rank], comm), sum_in_order(rows)[comm.rank]), (dtype, count)


def check_copies(comm: tk.Communicator) -> None:
    for dtype in (*DTYPES, torch.int64, torch.bool):
        for count in (0, 1, 1000, 100_001):
            everyone = [of_rank(rank, (count,), torch.float32).mul(10).to(dtype) for rank in range(comm.world_size)]
            assert torch.equal(tk.all_gather(everyone[comm.rank], comm), torch.stack(everyone))
            for root in range(comm.world_size):
                assert torch.equal(tk.broadcast(everyone[comm.rank], comm, root=root), everyone[root])
            x = everyone[comm.rank].clone()
            assert torch.equal(tk.broadcast(x, comm, out=x), everyone[0])


def check_norms(comm: tk.Communicator) -> None:
    for dtype in DTYPES:
        for tokens, hidden_size in ((1, 576), (3, 37), (0, 8), (40, 4096), (1, 200_000)):
            x = of_rank(comm.rank, (tokens, hidden_size), dtype)
            residual, weight = of_rank(50, (tokens, hidden_size), dtype), of_rank(51, (hidden_size,), dtype)
            expected = tk.fused_add_rms_norm(tk.all_reduce(x, comm), residual, weight, 1e-5)
            given = (x.clone(), residual.clone())
            for pair in (
                tk.all_reduce_rms_norm(x, residual, weight, 1e-5, comm),
                tk.all_reduce_rms_norm(*given, weight, 1e-5, comm, out=given),
            ):
                assert torch.equal(pair[0], expected[0])
                assert torch.equal(pair[1], expected[1])
            exact = [of_rank(rank, (tokens, hidden_size), torch.float64) for rank in range(comm.world_size)]
            total = torch.stack(exact[::-1]).sum(0).float().to(dtype)  # of few bits: exact in any order
            got = tk.all_reduce_rms_norm(exact[comm.rank], residual, weight, 1e-5, comm)
            for pair in zip(got, tk.fused_add_rms_norm(total, residual, weight, 1e-5), strict=True):
                assert torch.equal(*pair)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_collective_gives_the_sum_in_order_to_the_bit(world_size: int) -> None:
    assert ranks.run(check_collectives, world_size) == ["shared_memory"] * world_size


def many_ranks(comm: tk.Communicator) -> None:
    check_sums(comm, 1000, torch.bfloat16, 0)
    check_sums(comm, 70_001, torch.float32, 1)


def test_eight_ranks_share_two_cores() -> None:
    ranks.run(many_ranks, 8)


def large(comm: tk.Communicator) -> None:
    everyone = [of_rank(rank, (4 << 20,), torch.float32) for rank in range(comm.world_size)]
    assert torch.equal(tk.all_reduce(everyone[comm.rank], comm), sum_in_order(everyone))


def test_sixteen_megabytes() -> None:
    for world_size in (2, 3):
        ranks.run(large, world_size)


def special_values(comm: tk.Communicator) -> list[float]:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[inf, -inf, nan, -0.0, 1e38, inf], [1, -inf, 1, -0.0, 3e38, -inf]])[comm.rank]
    return tk.all_reduce(x, comm).tolist()


def test_infinities_and_nan_are_summed_as_any() -> None:
    one, other = ranks.run(special_values, 2)
    assert str(one) == str(other) == "[inf, -inf, nan, -0.0, inf, nan]"


def random_all_reduces(comm: tk.Communicator, count: int, largest: int) -> None:
    """All ranks draw the same sizes, and check every sum."""
    sizes = random.Random(7)
    pool = [of_rank(rank, (largest + 64,), torch.float32) for rank in range(comm.world_size)]
    expected, out = sum_in_order(pool), torch.empty(largest)
    for _ in range(count):
        size, start = sizes.randint(0, largest), sizes.randrange(64)
        tk.all_reduce(pool[comm.rank][start : start + size], comm, out=out[:size])
        assert torch.equal(out[:size], expected[start : start + size])


def test_random_sizes_one_after_the_other() -> None:
    ranks.run(random_all_reduces, 2, 5000, 4096)
    ranks.run(random_all_reduces, 4, 500, 40_000)


@pytest.mark.stress
def test_a_million_random_all_reduces() -> None:
    with ranks.start(random_all_reduces, 2, 1_000_000, 2048) as running:
        assert running.results(patience=3600) == [None, None]
        assert running.join() == [0, 0]


def two_communicators(comm: tk.Communicator) -> None:
    with tk.Communicator.from_process_group(dist.group.WORLD) as other:
        for i in range(100):
            x = torch.full((i,), float(comm.rank + 1))
            assert torch.equal(tk.all_reduce(x, comm), torch.full((i,), 3.0))
            assert torch.equal(tk.all_reduce(x * 2, other), torch.full((i,), 6.0))
            assert torch.equal(tk.all_gather(x, other)[1], torch.full((i,), 2.0))
        tk.all_reduce(torch.ones(1), other)
    tk.all_reduce(torch.ones(1), comm)  # goes on after the other was closed


def test_communicators_do_not_disturb_one_another() -> None:
    ranks.run(two_communicators, 2)


def part_of_the_ranks(comm: tk.Communicator) -> float:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with tk.Communicator.from_process_group(pairs[comm.rank // 2]) as pair:
        assert (pair.rank, pair.world_size) == (comm.rank % 2, 2)
        total = tk.all_reduce(torch.tensor([float(comm.rank)]), pair).item()
        tk.all_reduce(torch.ones(1), comm)
    return total


def test_subgroups() -> None:
    assert ranks.run(part_of_the_ranks, 4) == [1.0, 1.0, 5.0, 5.0]


# ---- memory that the others read where it lies


def registered(comm: tk.Communicator) -> None:
    """Two places in turns, as partial sums of layers; large ones too, and some that lie elsewhere in between."""
    memory = comm.registered.view(torch.float32).view(2, -1)
    for seed, count in enumerate([1, 7, 64, 5000, 70_000, 300_001, 12] * 2):
        everyone = [of_rank(rank, (count,), torch.float32, seed) for rank in range(comm.world_size)]
        x = memory[seed % 2, :count].copy_(everyone[comm.rank])
        assert torch.equal(tk.all_reduce(x, comm), sum_in_order(everyone)), count
        assert torch.equal(x, everyone[comm.rank])
        if seed % 3 == 0:
            assert torch.equal(tk.all_reduce(x, comm, out=x), sum_in_order(everyone))  # which takes the usual way
    for tokens in (1, 300):
        x = memory[0, : 576 * tokens].view(tokens, 576).copy_(of_rank(comm.rank, (tokens, 576), torch.float32))
        residual, weight = of_rank(50, (tokens, 576), torch.float32), of_rank(51, (576,), torch.float32)
        expected = tk.fused_add_rms_norm(tk.all_reduce(x.clone(), comm), residual, weight, 1e-5)
        for got, wanted in zip(tk.all_reduce_rms_norm(x, residual, weight, 1e-5, comm), expected, strict=True):
            assert torch.equal(got, wanted)
    if comm.backend == "shared_memory" and comm.world_size > 1:
        with pytest.raises(tk.CommunicatorError, match="called"):
            tk.all_reduce(memory[0, :8] if comm.rank else memory[1, :8], comm)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_registered_memory_is_summed_where_it_lies(world_size: int) -> None:
    ranks.run(registered, world_size, registered_bytes=8 * 301_000)


def test_registered_memory_lives_as_long_as_its_tensors() -> None:
    native = _host.Communicator(_host.Segment.create(1, 1000), 0, [os.getpid()], 1.0)
    memory = shared_memory.SharedMemoryTransport(native, 1000).registered
    del native
    gc.collect()
    assert memory.fill_(3).sum() == 3000


# ---- in plans, and in the company of other threads


def replays(comm: tk.Communicator) -> str:
    """A plan with collectives gives what the calls give, and fails as they do."""
    x, residual, weight = torch.zeros(3, 40), torch.zeros(3, 40), torch.randn(40)
    gathered, sums, row = (torch.empty(comm.world_size, 3, 40) for _ in range(3))

    def calls() -> None:
        tk.all_gather(x, comm, out=gathered)
        tk.all_reduce(gathered, comm, out=sums)
        tk.reduce_scatter(sums, comm, out=row[0])
        tk.broadcast(row[0], comm, root=comm.world_size - 1, out=row[1])
        tk.all_reduce_rms_norm(x, residual, weight, 1e-5, comm, out=(x, residual))

    memory = (x, residual, weight, gathered, sums, row)
    plan = Plan(calls, keep_alive=memory)
    for seed in range(20):
        x.copy_(of_rank(comm.rank, (3, 40), torch.float32, seed))
        residual.copy_(of_rank(60, (3, 40), torch.float32, seed))
        given = x.clone(), residual.clone()
        plan.replay()
        replayed = [tensor.clone() for tensor in memory]
        x.copy_(given[0])
        residual.copy_(given[1])
        calls()
        assert all(map(torch.equal, replayed, memory))
    if comm.rank == 1:
        comm.close()
    with pytest.raises(tk.CommunicatorError, match="rank 1 has closed its communicator") as error:
        plan.replay()
    return str(error.value)


def test_plans_hold_collectives() -> None:
    assert "at rank 0: rank 1 has closed" in ranks.run(replays, 2)[0]


def compiled(comm: tk.Communicator) -> None:
    def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        gathered = tk.all_gather(x * 2, comm)
        total = tk.all_reduce(x + gathered[0], comm)
        return tk.all_reduce_rms_norm(total, residual, weight, 1e-5, comm)

    x, residual, weight = of_rank(comm.rank, (2, 8), torch.float32), torch.ones(2, 8), torch.ones(8)
    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(fast(x, residual, weight), function(x, residual, weight), strict=True):
        assert torch.equal(got, expected)


def test_collectives_are_compiled_without_a_break() -> None:
    ranks.run(compiled, 2)


def threads(comm: tk.Communicator) -> bool:
    """Rank 0 waits, while another thread of its own goes on."""
    counted = 0

    def count() -> None:
        nonlocal counted
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            counted += 1

    other = threading.Thread(target=count)
    if comm.rank == 0:
        other.start()
    else:
        time.sleep(0.5)
    before = counted
    tk.all_reduce(torch.ones(1), comm)
    went_on = counted > before
    if comm.rank == 0:
        other.join()
    return went_on


def test_other_threads_of_python_run_while_a_rank_waits() -> None:
    assert ranks.run(threads, 2)[0]


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
