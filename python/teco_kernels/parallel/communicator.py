"""The ranks that compute together, and the way that their data takes."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from teco_kernels._host import CommunicatorError
from teco_kernels.ops._library import emulates_cuda
from teco_kernels.parallel.device_memory import DeviceMemoryTransport, connect_devices
from teco_kernels.parallel.hierarchy import HierarchyTransport, connect_hosts
from teco_kernels.parallel.operators import OperatorTransport
from teco_kernels.parallel.process_group import ProcessGroupTransport
from teco_kernels.parallel.shared_memory import SEVERAL_HOSTS, SharedMemoryTransport, connect_within, hosts_of

__all__ = ["DEFAULT_TIMEOUT", "Communicator", "CommunicatorError"]

#: Seconds that ranks wait for one another when nothing else is said.
DEFAULT_TIMEOUT = 300.0


_BACKENDS = {
    SharedMemoryTransport: "shared_memory",
    DeviceMemoryTransport: "device_memory",
    ProcessGroupTransport: "process_group",
    HierarchyTransport: "hierarchy",
}


class Transport(Protocol):
    """What the collectives call; checks its arguments. `out` is `x` itself or apart from it."""

    registered: Tensor

    def all_reduce(self, out: Tensor, x: Tensor) -> None:
        """Write the sum over the ranks."""

    def all_reduce_rms_norm(
        self, normed: Tensor, new_residual: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> None:
        """Write the sum plus the residual, and its norm."""

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Write the tensors of all ranks."""

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """Write this rank's row of the sum."""

    def broadcast(self, out: Tensor, x: Tensor, root: int) -> None:
        """Write the root's tensor."""

    def close(self) -> None:
        """Take part no more."""


class Communicator:
    """Ranks that call the same collectives in the same order; made by `from_process_group`, by all of them together.

    Any number of communicators may exist side by side, each with an order of its own. One that has failed, or that a
    rank has closed, stays so: every later call raises `CommunicatorError`. As a context manager it closes itself.

    Attributes
    ----------
    rank, world_size : int
    backend : {"shared_memory", "device_memory", "process_group", "hierarchy"}
        Whether the ranks share memory, their GPUs read one another's, the torch.distributed group carries the data, or
        ranks of several hosts share memory on each, and a group carries the data between these. The same on all ranks,
        chosen once. The last one adds up host by host; all others give the same bits.
    reason : str
        Why it is not memory alone; empty otherwise.
    timeout : float
        Seconds that a rank waits for another before it gives up on it.
    """

    def __init__(self, transport: Transport, rank: int, world_size: int, timeout: float, reason: str) -> None:
        self.transport = transport
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.reason = reason
        self._backend = next(name for kind, name in _BACKENDS.items() if isinstance(transport, kind))

    @property
    def backend(self) -> str:
        """What carries the data."""
        return self._backend

    @property
    def registered(self) -> Tensor:
        """Memory of this rank that the others can read, uint8.

        What `all_reduce` and `all_reduce_rms_norm` are given from there, at the same place on every rank, is not copied
        (up to what is added up in one shot). Others may read it until this rank has come out of the next collective:
        write it again after that, and never let `out` lie there.
        """
        return self.transport.registered

    @property
    def is_recordable(self) -> bool:
        """Whether a `Plan` can hold the collectives, and `torch.compile` trace them."""
        return isinstance(self.transport, OperatorTransport)

    @classmethod
    def from_process_group(
        cls,
        group: dist.ProcessGroup | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        registered_bytes: int = 0,
        device: str | torch.device = "cpu",
    ) -> Communicator:
        """Connect the ranks of a group; all of them must call it.

        Ranks of one host, 8 at the most, share memory. Where they are on several hosts, or in containers that do not
        see one another, as many on each, those of a host do, and the first rank of each exchanges with the others over
        a group of these. GPUs of one host, 8 at the most, read one another's memory where they can. Otherwise, and
        without the system calls that it takes, the group does all the work.

        Parameters
        ----------
        group : torch.distributed.ProcessGroup, optional
            The default group when not given. Used here, and later only if it has to carry the data.
        timeout : float
            Seconds, also for connecting; ``math.inf`` waits for as long as all ranks live.
        registered_bytes : int
            Of `registered`; the same on all ranks.
        device : str or torch.device
            Where the tensors of this rank are, the CPU or a GPU; the same kind on all ranks.

        Raises
        ------
        CommunicatorError
            A rank has ended, or did not come in time.
        """
        if not timeout > 0:
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise ValueError("group: expected a process group, or torch.distributed to be initialised")
        transport, reason = _choose_transport(group, timeout, registered_bytes, torch.device(device))
        return cls(transport, dist.get_rank(group), dist.get_world_size(group), timeout, reason)

    @classmethod
    def alone(cls, device: str | torch.device = "cpu") -> Communicator:
        """A communicator of this process only, whose collectives copy.

        Raises
        ------
        RuntimeError
            The system lacks what ranks need to share memory, or the build CUDA kernels.
        """
        where = torch.device(device)
        transport = DeviceMemoryTransport.alone(where) if _is_for_kernels(where) else SharedMemoryTransport.alone()
        return cls(transport, 0, 1, DEFAULT_TIMEOUT, "")

    def close(self) -> None:
        """Take part no more; what the other ranks call from now on raises `CommunicatorError` there."""
        self.transport.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Communicator(rank {self.rank} of {self.world_size}, {self.backend})"


def _is_for_kernels(device: torch.device) -> bool:
    """Whether tensors there go to CUDA kernels, emulated ones included."""
    return device.type == "cuda" or emulates_cuda()


def _choose_transport(
    group: dist.ProcessGroup, timeout: float, registered_bytes: int, device: torch.device
) -> tuple[Transport, str]:
    """What carries the data, and why it is not memory alone; all ranks choose the same."""
    chosen: Transport | None = None
    if device.type not in {device.type for device in group._device_types}:
        reason = f"the group has no backend for the {device.type}"
    elif _is_for_kernels(device):
        chosen, reason = connect_devices(hosts_of(group, timeout), group, timeout, registered_bytes, device)
    elif len(hosts := hosts_of(group, timeout)) == 1:
        native, reason, _ = connect_within(hosts, group, timeout, registered_bytes)
        chosen = None if native is None else SharedMemoryTransport(native, registered_bytes)
    else:
        chosen, problem = connect_hosts(hosts, group, timeout, registered_bytes)
        reason = problem or SEVERAL_HOSTS
    return chosen or ProcessGroupTransport(group, timeout, registered_bytes, device), reason
