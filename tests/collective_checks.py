"""What collectives must give, to the bit: called on every rank, by the tests of communicators and of transports."""

from __future__ import annotations

import torch
from torch import Tensor

import teco_kernels as tk
from teco_kernels import _host

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def of_rank(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """What a rank gives; all ranks know what the others give, to check what they get."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def sum_in_order(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].float()
    for tensor in tensors[1:]:
        total = total + tensor.float()
    return total.to(tensors[0].dtype)


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
