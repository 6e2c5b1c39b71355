"""Collectives of several ranks: results to the bit, in registered memory, in plans, beside other threads."""

from __future__ import annotations

import gc
import os
import random
import threading
import time

import pytest
import ranks
import torch
import torch.distributed as dist
from collective_checks import check_collectives, check_sums, of_rank, sum_in_order
from torch import Tensor

import teco_kernels as tk
from teco_kernels import _host
from teco_kernels.ops import Plan
from teco_kernels.parallel import shared_memory

pytestmark = pytest.mark.usefixtures("nothing_left_in_shared_memory")


# ---- results


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
