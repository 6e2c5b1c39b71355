"""Collectives of ranks on several hosts: shared memory within each, the group's data between them.

Every host hands over to its first rank, the leader; leaders exchange over a process group of their own, and hand back.
So a host sends what one rank would, and ranks that share a host never wait for the network one by one. Sums are made
host by host: within a host in the order of its ranks, then in the order of the hosts, in fp32 (fp64 in fp64), rounded
once. All ranks get the same bits; those of one host's ranks only where sums are exact, see `gptq_matmul`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from teco_kernels._host import CommunicatorError
from teco_kernels.ops import fused_add_rms_norm
from teco_kernels.parallel.arguments import check_copy, check_norm, check_root, check_rows, check_sum
from teco_kernels.parallel.process_group import ProcessGroupTransport, add_rows
from teco_kernels.parallel.shared_memory import SEVERAL_HOSTS, SharedMemoryTransport, agree, connect, hosts_of


class HierarchyTransport:
    """The collectives in three steps: within the host, between leaders, within the host again.

    Parameters
    ----------
    hosts : sequence of sequence of int
        The ranks of each host, as many on each.
    rank : int
    local : SharedMemoryTransport
        Of this host's ranks.
    across : ProcessGroupTransport or None
        Of the leaders; None on other ranks.
    registered_bytes : int
    """

    def __init__(
        self,
        hosts: Sequence[Sequence[int]],
        rank: int,
        local: SharedMemoryTransport,
        across: ProcessGroupTransport | None,
        registered_bytes: int = 0,
    ) -> None:
        self._hosts = hosts
        self._rank, self._world_size = rank, sum(map(len, hosts))
        self._host = next(index for index, ranks in enumerate(hosts) if rank in ranks)
        self._local, self._across = local, across
        self.registered = torch.empty(registered_bytes, dtype=torch.uint8)  # as good as any

    def all_reduce(self, out: Tensor, x: Tensor) -> None:
        """Write the sum over the ranks."""
        check_sum(out, x, x.shape)
        out.copy_(self._sum(x))

    def all_reduce_rms_norm(
        self, normed: Tensor, new_residual: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> None:
        """Write the sum plus the residual, and its norm."""
        check_norm(normed, new_residual, x, residual, weight)
        normed.copy_(self._sum(x).float())
        fused_add_rms_norm(normed, residual, weight, eps, out=(normed, new_residual))

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Write the tensors of all ranks."""
        check_rows(out, x, self._rank, self._world_size)
        own = x.new_empty(len(self._hosts[self._host]), *x.shape)
        everyone = x.new_empty(len(self._hosts), *own.shape)
        self._local.all_gather(own, x)
        if self._across is not None:
            self._lead(self._across.all_gather, everyone, own)
        self._local.broadcast(everyone, everyone, 0)
        for ranks, rows in zip(self._hosts, everyone, strict=True):
            out[list(ranks)] = rows

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """Write this rank's row of the sum."""
        if x.dim() == 0 or x.shape[0] != self._world_size:
            raise ValueError(f"input: expected shape [{self._world_size}, ...], a row per rank, got {list(x.shape)}")
        check_sum(out, x, x.shape[1:])
        out.copy_(self._sum(x)[self._rank])

    def broadcast(self, out: Tensor, x: Tensor, root: int) -> None:
        """Write the root's tensor."""
        check_root(root, self._world_size)
        check_copy(out, x, x.shape)
        host = next(index for index, ranks in enumerate(self._hosts) if root in ranks)
        if host == self._host:  # to its leader, and all others there
            self._local.broadcast(out, x, self._hosts[host].index(root))
        if self._across is not None:
            self._lead(self._across.broadcast, out, out, host)
        if host != self._host:
            self._local.broadcast(out, out, 0)

    def close(self) -> None:
        """Take part no more."""
        self._local.close()
        if self._across is not None:
            self._across.close()

    def _sum(self, x: Tensor) -> Tensor:
        rows = x.new_empty(len(self._hosts[self._host]), *x.shape)
        self._local.all_gather(rows, x)
        total = add_rows(rows)
        if self._across is not None:
            self._lead(self._across.add, total, total)
        self._local.broadcast(total, total, 0)
        return total

    def _lead(self, collective: Callable[..., None], *args: object) -> None:
        """What leaders do; where it fails, the ranks of this host hear of it at once."""
        try:
            collective(*args)
        except CommunicatorError:
            self.close()
            raise


def connect_hosts(
    group: dist.ProcessGroup, timeout: float, registered_bytes: int
) -> tuple[HierarchyTransport | None, str]:
    """The transport of this rank, or None and the reason, which all ranks share."""
    rank = dist.get_rank(group)
    hosts = hosts_of(group, timeout)
    if len({len(ranks) for ranks in hosts}) > 1:
        return None, f"{SEVERAL_HOSTS}: not as many on each"
    if len(hosts[0]) == 1:
        return None, SEVERAL_HOSTS
    names = dist.get_process_group_ranks(group)

    def subgroup(ranks: Sequence[int]) -> dist.ProcessGroup:
        made: dist.ProcessGroup = dist.new_group([names[member] for member in ranks], use_local_synchronization=True)
        return made

    own = next(ranks for ranks in hosts if rank in ranks)
    local_group = subgroup(own)
    # Of the ranks with one place on their hosts. Only the leaders' is used, but torch names a group by how many a rank
    # has, so all must have as many.
    column = subgroup([ranks[own.index(rank)] for ranks in hosts])
    native, problem = connect(local_group, timeout, 0)
    if reason := agree(group, problem, timeout):
        return None, reason
    assert native is not None
    across = ProcessGroupTransport(column, timeout) if rank == own[0] else None
    return HierarchyTransport(hosts, rank, SharedMemoryTransport(native), across, registered_bytes), ""
