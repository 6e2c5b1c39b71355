"""Collectives of GPUs, emulated: several ranks at a time, stores that arrive late, several orders of threads."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from collective_checks import DTYPES, of_rank, sum_in_order
from emulated_cuda import emulation, library
from emulated_ranks import SMALL, EmulatedRanks, collectives_are_right, emulated_ranks, unaligned
from torch import Tensor

import teco_kernels as tk
from teco_kernels.ops import Plan, _library
from teco_kernels.parallel.device_memory import connect_devices
from teco_kernels.testing import TOLERANCE

WORLD_SIZES = (2, 3, 4, 8)
SEEDS = (0, 1, 2, 5)


# ---- results


# None, one, odd ones, ragged ends of stretches; large ones that are summed in two shots between small ones in one.
COUNTS = (0, 1, 7, 1000, 4097, 8, 750, 6000, 33, 1499, 1501)


def sums(comm: tk.Communicator, dtype: torch.dtype) -> list[Tensor]:
    results = []
    for seed, count in enumerate(COUNTS):
        x = of_rank(comm.rank, (count,), dtype, seed)
        results += [tk.all_reduce(x, comm), tk.all_reduce(unaligned(x), comm)]
    return results


def scattered(comm: tk.Communicator, dtype: torch.dtype) -> list[Tensor]:
    return [
        tk.reduce_scatter(of_rank(comm.rank, (comm.world_size, count), dtype, seed), comm)
        for seed, count in enumerate(COUNTS)
    ]


def copies(comm: tk.Communicator, dtype: torch.dtype) -> list[Tensor]:
    results = []
    for seed, count in enumerate((1, 1000, 5003)):
        x = of_rank(comm.rank, (count,), torch.float32, seed).mul(10).to(dtype)
        rows = x.new_zeros(comm.world_size, count)
        rows[comm.rank] = x
        results += [
            tk.all_gather(x, comm),
            tk.all_gather(rows[comm.rank], comm, out=rows),
            tk.broadcast(x, comm, root=seed % comm.world_size),
        ]
    return results


def on_cpu(comm: tk.Communicator) -> bytes:
    """What the communicator of the CPU gives."""
    results = {
        f"{function.__name__} {dtype}": function(comm, dtype)
        for function in (sums, scattered, copies)
        for dtype in (*DTYPES, *((torch.int64, torch.bool) if function is copies else ()))
    }
    saved = io.BytesIO()
    torch.save(results, saved)
    return saved.getvalue()


@pytest.fixture(scope="module", params=WORLD_SIZES)
def expected(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, list[Tensor]]]]:
    """World size, and per rank what the ranks of the CPU compute."""
    return request.param, [torch.load(io.BytesIO(saved)) for saved in ranks.run(on_cpu, request.param)]


def check(world_size: int, seed: int, dtype: torch.dtype, function: Any, expected: list[dict[str, Any]]) -> None:
    with emulated_ranks(world_size, seed=seed, **SMALL) as emulated:
        results = emulated.on_all(lambda comm: function(comm, dtype))
        emulated.run()
    for rank, (got, wanted) in enumerate(zip(results, expected, strict=True)):
        for number, pair in enumerate(zip(got, wanted[f"{function.__name__} {dtype}"], strict=True)):
            assert torch.equal(*pair), (rank, number)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [sums, scattered], ids=lambda f: f.__name__)
def test_bits_are_those_of_the_cpu(expected: Any, function: Any, dtype: torch.dtype, seed: int) -> None:
    world_size, results = expected
    check(world_size, seed, dtype, function, results)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool], ids=str)
def test_copies_are_those_of_the_cpu(expected: Any, dtype: torch.dtype, seed: int) -> None:
    world_size, results = expected
    check(world_size, seed, dtype, copies, results)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_sizes(world_size: int, dtype: torch.dtype) -> None:
    """Slots and blocks as they are outside of tests."""
    with emulated_ranks(world_size, seed=2) as emulated:
        everyone = [of_rank(rank, (5001,), dtype) for rank in range(world_size)]
        results = emulated.on_all(lambda comm: tk.all_reduce(everyone[comm.rank], comm))
        emulated.run()
    for result in results:
        assert torch.equal(result, sum_in_order(everyone))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_in_place(world_size: int, seed: int) -> None:
    with emulated_ranks(world_size, seed=seed, **SMALL) as emulated:
        for count in (40, 3001):
            everyone = [of_rank(rank, (count,), torch.float16) for rank in range(world_size)]
            total = sum_in_order(everyone)
            for x in emulated.on_all(
                lambda comm, everyone=everyone: tk.all_reduce(everyone[comm.rank], comm, out=everyone[comm.rank])
            ):
                assert x is everyone[0] or x.shape == total.shape
            emulated.run()
            for x in everyone:
                assert torch.equal(x, total)


def test_infinities_and_zeros() -> None:
    inf = float("inf")
    given = [torch.tensor([inf, -0.0, 1e38, -inf]), torch.tensor([1, -0.0, 3e38, -inf])]
    with emulated_ranks(2) as emulated:
        results = emulated.on_all(lambda comm: tk.all_reduce(given[comm.rank], comm))
        emulated.run()
    for result in results:
        assert str(result.tolist()) == "[inf, -0.0, inf, -inf]"


# ---- the norm


NORM_SHAPES = ((1, 576), (3, 37), (0, 8), (11, 64), (2, 3000), (40, 16))


@pytest.mark.parametrize("seed", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_norm_gives_the_bits_of_its_parts(world_size: int, dtype: torch.dtype, seed: int) -> None:
    """One row and many, in one shot and in two, rows of ragged size and rows that do not fit a slot; in place too."""
    results: list[list[tuple[Tensor, Tensor]]] = []
    given, in_place = [], []
    with emulated_ranks(world_size, seed=seed, **SMALL) as emulated:
        for shape in NORM_SHAPES:
            everyone = [of_rank(rank, shape, dtype) for rank in range(world_size)]
            residual, weight = of_rank(50, shape, dtype), of_rank(51, shape[1:], dtype)
            given.append((everyone, residual, weight))
            in_place.append([(x.clone(), residual.clone()) for x in everyone])

            def norm(comm: tk.Communicator) -> tuple[Tensor, Tensor]:
                everyone, residual, weight = given[-1]
                pair = in_place[-1][comm.rank]
                tk.all_reduce_rms_norm(*pair, weight, 1e-5, comm, out=pair)
                return tk.all_reduce_rms_norm(everyone[comm.rank], residual, weight, 1e-5, comm)

            results.append(emulated.on_all(norm))
        emulated.run()
    with emulation():
        wanted = [tk.fused_add_rms_norm(sum_in_order(x), residual, weight, 1e-5) for x, residual, weight in given]
    for (normed, new_residual), of_ranks, placed, (x, residual, weight) in zip(
        wanted, results, in_place, given, strict=True
    ):
        on_cpu = tk.fused_add_rms_norm(sum_in_order(x), residual, weight, 1e-5)
        assert torch.equal(new_residual, on_cpu[1])
        torch.testing.assert_close(normed, on_cpu[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        for got in (*of_ranks, *placed):
            assert torch.equal(got[0], normed)
            assert torch.equal(got[1], new_residual)


# ---- memory that the others read where it lies


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_registered_memory_is_summed_where_it_lies(world_size: int, seed: int) -> None:
    """Two places in turns, written by kernels, as a decode step has them; and some that are not taken from there."""
    hidden = 64
    with emulated_ranks(world_size, seed=seed, registered_bytes=2 * 4 * 3 * hidden, **SMALL) as emulated:
        x = [of_rank(rank, (3, hidden), torch.float32) for rank in range(world_size)]
        weight, residual = of_rank(51, (hidden,), torch.float32), of_rank(50, (3, hidden), torch.float32)

        def layers(comm: tk.Communicator) -> list[Tensor]:
            places = comm.registered.view(torch.float32).view(2, 3, hidden)
            results = [x[comm.rank]]
            for layer in range(5):
                partial = tk.rms_norm(results[-1], weight, 1e-5 + 0.1 * comm.rank, out=places[layer % 2])
                if layer < 3:
                    results.append(tk.all_reduce(partial, comm))
                else:
                    results.append(tk.all_reduce_rms_norm(partial, residual, weight, 1e-5, comm)[0])
            partial = tk.rms_norm(results[-1], weight, 1e-5, out=places[1])
            results.append(tk.all_reduce(partial.view(-1)[1:33], comm))  # no vector begins there
            return results

        results = emulated.on_all(layers)
        emulated.run()
    with emulation():
        states = list(x)
        for layer in range(5):
            partials = [tk.rms_norm(state, weight, 1e-5 + 0.1 * rank) for rank, state in enumerate(states)]
            total = sum_in_order(partials)
            if layer >= 3:
                total = tk.fused_add_rms_norm(total, residual, weight, 1e-5)[0]
            states = [total] * world_size
            for result in results:
                assert torch.equal(result[layer + 1], total)
        last = sum_in_order([tk.rms_norm(states[0], weight, 1e-5)] * world_size).view(-1)[1:33]
    for result in results:
        assert torch.equal(result[6], last)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_of_it_together(seed: int) -> None:
    """What `cuda_mutations.py` holds the kernels against."""
    assert collectives_are_right(library(), seed)


# ---- launches that are always the same


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_is_replayed(seed: int) -> None:
    """As a graph would be: no argument of a launch changes from one call to the next."""
    world_size = 3
    with emulated_ranks(world_size, seed=seed, **SMALL) as emulated:
        x = [torch.zeros(1200) for _ in range(world_size)]
        total, gathered = [torch.zeros(1200) for _ in range(3)], [torch.zeros(3, 1200) for _ in range(3)]

        def record(comm: tk.Communicator) -> Plan:
            def calls() -> None:
                tk.all_reduce(x[comm.rank], comm, out=total[comm.rank])
                tk.all_gather(total[comm.rank], comm, out=gathered[comm.rank])
                tk.all_reduce(x[comm.rank][:5], comm, out=total[comm.rank][:5])

            return Plan(calls, keep_alive=(x, total, gathered))

        plans = emulated.on_all(record)
        emulated.run()
        for turn in range(4):
            for rank in range(world_size):
                x[rank].copy_(of_rank(rank, (1200,), torch.float32, turn))
            for rank in range(world_size):
                emulated.call(rank, plans[rank].replay)
            emulated.run()
            for rank in range(world_size):
                assert torch.equal(total[rank], sum_in_order(x))
                assert torch.equal(gathered[rank], torch.stack([sum_in_order(x)] * 3))


# ---- when something goes wrong


def after(emulated: EmulatedRanks, function: Callable[[tk.Communicator], Any]) -> list[str]:
    """What the ranks' next calls say once this has run."""
    emulated.on_all(function)
    emulated.run()
    said = []
    for comm in emulated.comms:
        try:
            emulated.call(comm.rank, tk.all_reduce, torch.ones(4), comm)
            said.append("")
        except tk.CommunicatorError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_that_does_not_come(seed: int) -> None:
    def without_one(comm: tk.Communicator) -> None:
        for count in (8, 4000):
            if comm.rank != 1:
                tk.all_reduce(torch.ones(count), comm)

    with emulated_ranks(3, seed=seed, **SMALL) as emulated:
        said = after(emulated, without_one)
        assert said[1] == ""  # which has not looked yet
        for rank in (0, 2):
            assert f"at rank {rank}: rank 1 did not come within the timeout, as rank " in said[rank]
        emulated.run()
        assert "rank 1 did not come" in after(emulated, lambda comm: None)[1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "call",
    [
        lambda comm: tk.all_reduce(torch.ones(8 if comm.rank else 12), comm),
        lambda comm: tk.all_reduce(torch.ones(8, dtype=torch.float16 if comm.rank else torch.bfloat16), comm),
        lambda comm: tk.all_reduce(torch.ones(8), comm) if comm.rank else tk.all_gather(torch.ones(8), comm),
        lambda comm: tk.broadcast(torch.ones(8), comm, root=comm.rank),
        lambda comm: tk.all_reduce(torch.ones(8 if comm.rank else 4000), comm),
        lambda comm: tk.all_reduce_rms_norm(*torch.ones(2, 4, 3 + comm.rank), torch.ones(3 + comm.rank), 1e-5, comm),
    ],
    ids=["size", "dtype", "kind", "root", "blocks", "rows"],
)
def test_calls_that_differ(call: Callable[[tk.Communicator], Any], seed: int) -> None:
    with emulated_ranks(2, seed=seed, **SMALL) as emulated:
        said = after(emulated, call)
        emulated.run()
        said += after(emulated, lambda comm: None)
    assert sum("called another collective, or one of another size or dtype" in text for text in said) >= 2


def test_closed() -> None:
    with emulated_ranks(2) as emulated:
        emulated.comms[0].close()
        with pytest.raises(tk.CommunicatorError, match="at rank 0: it was closed here"):
            emulated.call(0, tk.all_reduce, torch.ones(1), emulated.comms[0])
        emulated.run()


def test_arguments() -> None:
    with emulated_ranks(1) as emulated:
        comm = emulated.comms[0]
        with pytest.raises(ValueError, match="input: expected a contiguous tensor"):
            tk.all_reduce(torch.ones(4, 4).T, comm)
        with pytest.raises((TypeError, ValueError), match="float64"):
            tk.all_reduce_rms_norm(torch.ones(2, 4).double(), torch.ones(2, 4), torch.ones(4), 1e-5, comm)
    with pytest.raises(
        ValueError, match=r"comm: there is no communicator with number \d+ .* for tensors on this device"
    ):
        tk.all_reduce(torch.ones(4), comm)


# ---- who carries the data


def devices_of(comm: tk.Communicator, emulated: Path | None) -> tuple[str, str]:
    _library.emulate_cuda(emulated)
    transport, reason = connect_devices([list(range(comm.world_size))], dist.group.WORLD, 20.0, 0, torch.device("cpu"))
    return type(transport).__name__, reason


def test_ranks_connect_their_devices() -> None:
    """Handles are exchanged and opened; what lies behind them is another matter, the ranks being processes."""
    for name, reason in ranks.run(devices_of, 2, library()):
        assert (name, reason) == ("DeviceMemoryTransport", "")


def test_a_build_without_kernels_leaves_it_to_the_group() -> None:
    for name, reason in ranks.run(devices_of, 2, None):
        assert (name, reason) == ("NoneType", "rank 0: this build has no CUDA kernels")


def test_several_hosts_leave_it_to_the_group() -> None:
    assert connect_devices([[0], [1]], None, 1.0, 0, torch.device("cuda"))[1] == "the ranks are on several hosts"  # type: ignore[arg-type]
