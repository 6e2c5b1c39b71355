"""Collectives of ranks on several hosts: shared memory within each, the group's data between them.

Every host hands over to its first rank, the leader; leaders exchange, one with another over the group, and hand back.
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
from teco_kernels.parallel.process_group import add_rows, wait
from teco_kernels.parallel.shared_memory import SEVERAL_HOSTS, SharedMemoryTransport, connect_within


class Leaders:
    """The first rank of each host, to this one of them.

    No group of their own: torch names one by how many its process has, so ranks that have other groups besides would
    wait for different ones.

    Parameters
    ----------
    group : ProcessGroup
        Of all ranks.
    ranks : sequence of int
        The leaders, in the order of their hosts.
    timeout : float
    tag : int
        Of this communicator's messages, among those of others over the same group.
    """

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], timeout: float, tag: int) -> None:
        self._group, self._ranks, self._timeout, self._tag = group, ranks, timeout, tag
        self._own = list(ranks).index(dist.get_rank(group))

    def gather(self, rows: Tensor) -> None:
        """Fill in what the others have in place of their rows; this one's is there."""
        work = [self._send(rows[self._own], host) for host in self._others]
        self._wait(work + [self._receive(rows[host], host) for host in self._others])

    def broadcast(self, x: Tensor, root: int) -> None:
        """Send `x` to the others, or receive it from host `root`."""
        if root == self._own:
            self._wait([self._send(x, host) for host in self._others])
        else:
            self._wait([self._receive(x, root)])

    @property
    def _others(self) -> list[int]:
        return [host for host in range(len(self._ranks)) if host != self._own]

    def _send(self, x: Tensor, host: int) -> dist.Work | None:
        return dist.isend(x, group=self._group, group_dst=self._ranks[host], tag=self._tag)

    def _receive(self, x: Tensor, host: int) -> dist.Work | None:
        return dist.irecv(x, group=self._group, group_src=self._ranks[host], tag=self._tag)

    def _wait(self, work: Sequence[dist.Work | None]) -> None:
        try:
            for item in work:
                wait(item, self._timeout)
        except RuntimeError as error:
            raise CommunicatorError(f"communicator of several hosts: {error}") from error


class HierarchyTransport:
    """The collectives in three steps: within the host, between leaders, within the host again.

    Parameters
    ----------
    hosts : sequence of sequence of int
        The ranks of each host, as many on each.
    rank : int
    local : SharedMemoryTransport
        Of this host's ranks.
    across : Leaders or None
        None on other ranks.
    registered_bytes : int
    """

    def __init__(
        self,
        hosts: Sequence[Sequence[int]],
        rank: int,
        local: SharedMemoryTransport,
        across: Leaders | None,
        registered_bytes: int = 0,
    ) -> None:
        self._hosts = hosts
        self._rank, self._world_size = rank, sum(map(len, hosts))
        self._host = self._host_of(rank)
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
        everyone = x.new_empty(len(self._hosts), len(self._hosts[self._host]), *x.shape)
        self._local.all_gather(everyone[self._host], x)
        self._lead(lambda leaders: leaders.gather(everyone))
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
        host = self._host_of(root)
        if host == self._host:  # to its leader, and all others there
            self._local.broadcast(out, x, self._hosts[host].index(root))
        self._lead(lambda leaders: leaders.broadcast(out, host))
        if host != self._host:
            self._local.broadcast(out, out, 0)

    def close(self) -> None:
        """Take part no more."""
        self._local.close()

    def _host_of(self, rank: int) -> int:
        return next(index for index, ranks in enumerate(self._hosts) if rank in ranks)

    def _sum(self, x: Tensor) -> Tensor:
        """fp32, or fp64 of fp64."""
        rows = x.new_empty(len(self._hosts[self._host]), *x.shape)
        self._local.all_gather(rows, x)
        total = torch.empty(x.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)

        def add(leaders: Leaders) -> None:
            of_hosts = total.new_empty(len(self._hosts), *x.shape)
            of_hosts[self._host] = add_rows(rows)
            leaders.gather(of_hosts)
            total.copy_(add_rows(of_hosts))

        self._lead(add)
        self._local.broadcast(total, total, 0)
        return total

    def _lead(self, exchange: Callable[[Leaders], None]) -> None:
        """What leaders do; where it fails, the ranks of this host hear of it at once."""
        if self._across is None:
            return
        try:
            exchange(self._across)
        except CommunicatorError:
            self.close()
            raise


def connect_hosts(
    hosts: list[list[int]], group: dist.ProcessGroup, timeout: float, registered_bytes: int
) -> tuple[HierarchyTransport | None, str]:
    """The transport of this rank, or None and the reason, which all ranks share."""
    rank = dist.get_rank(group)
    if len({len(ranks) for ranks in hosts}) > 1:
        return None, f"{SEVERAL_HOSTS}: not as many on each"
    if len(hosts[0]) == 1:
        return None, SEVERAL_HOSTS
    native, reason, number = connect_within(hosts, group, timeout)
    if native is None:
        return None, reason
    own = next(ranks for ranks in hosts if rank in ranks)
    leaders = [ranks[0] for ranks in hosts]
    across = Leaders(group, leaders, timeout, number) if rank == own[0] else None
    return HierarchyTransport(hosts, rank, SharedMemoryTransport(native), across, registered_bytes), ""
