"""Collectives over shared memory, and how ranks come to share it."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from teco_kernels import _host
from teco_kernels._host import CommunicatorError
from teco_kernels.ops import collectives
from teco_kernels.parallel.process_group import wait

_MESSAGE_BYTES = 1024
_numbers = itertools.count()
#: Why ranks cannot all share memory, when some still may.
SEVERAL_HOSTS = "the ranks are on several hosts, or do not see one another's processes"


class SharedMemoryTransport:
    """The operators over a native communicator: they may be recorded in a `Plan`, and compiled.

    Attributes
    ----------
    number : int
        By which the operators know the communicator.
    registered : Tensor
        uint8 ``[registered_bytes]``, see `Communicator.registered`.
    """

    def __init__(self, native: _host.Communicator, registered_bytes: int = 0) -> None:
        self._native = native
        self.number = native.number
        self.registered = _memory_at(native.registered, registered_bytes, native)

    @classmethod
    def alone(cls) -> SharedMemoryTransport:
        """Of this process only. RuntimeError where the system lacks what ranks need to share memory."""
        return cls(_host.Communicator(_host.Segment.create(1), 0, [os.getpid()], 1.0))

    def all_reduce(self, out: Tensor, x: Tensor) -> None:
        """Write the sum over the ranks."""
        collectives.all_reduce(out, x, self.number)

    def all_reduce_rms_norm(
        self, normed: Tensor, new_residual: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> None:
        """Write the sum plus the residual, and its norm."""
        collectives.all_reduce_rms_norm(normed, new_residual, x, residual, weight, eps, self.number)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Write the tensors of all ranks."""
        collectives.all_gather(out, x, self.number)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """Write this rank's row of the sum."""
        collectives.reduce_scatter(out, x, self.number)

    def broadcast(self, out: Tensor, x: Tensor, root: int) -> None:
        """Write the root's tensor."""
        collectives.broadcast(out, x, root, self.number)

    def close(self) -> None:
        """Take part no more."""
        self._native.close()


def _memory_at(address: int, nbytes: int, owner: object) -> Tensor:
    """A uint8 tensor over memory that is there for as long as `owner` is, which it keeps."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    memory._owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8)


def problem_here() -> str:
    """Why this process cannot share memory with others; empty when it can."""
    try:
        SharedMemoryTransport.alone()
    except RuntimeError as error:
        return str(error)
    return ""


def connect_within(
    hosts: list[list[int]], group: dist.ProcessGroup, timeout: float, registered_bytes: int = 0
) -> tuple[_host.Communicator | None, str, int]:
    """Connect the ranks of each host; all ranks of the group call it.

    The first rank of a host makes the memory, without a name, so that nothing is left of it whoever dies when; the
    others open it by its descriptor in the first one, which is closed once all have done so.

    Returns
    -------
    native : Communicator or None
        Of this rank's host; None on all ranks where one could not.
    reason : str
        Why, which all ranks share.
    number : int
        The same on all ranks, another one for each call that rank 0 has made.
    """
    rank = dist.get_rank(group)
    ranks = next(ranks for ranks in hosts if rank in ranks)
    if len(ranks) > _host.MAX_RANKS:
        return None, f"{len(ranks)} ranks are more than {_host.MAX_RANKS}", 0

    here = {"pid": os.getpid(), "problem": problem_here(), "number": next(_numbers)}
    everyone = _exchange(group, here, timeout)
    number = everyone[0]["number"]
    if reason := _first_problem(everyone):
        return None, reason, number

    native, segment = None, None
    offer: dict[str, Any] = {"problem": ""}
    if rank == ranks[0]:
        try:
            segment = _host.Segment.create(len(ranks), registered_bytes)
            offer |= {"descriptor": segment.descriptor, "token": segment.token}
        except RuntimeError as error:
            offer["problem"] = str(error)
    offers = _exchange(group, offer, timeout)
    outcome = {"problem": _first_problem(offers)}
    pids = [everyone[member]["pid"] for member in ranks]
    if not outcome["problem"]:
        try:
            if segment is None:
                offer = offers[ranks[0]]
                found = offer["descriptor"], offer["token"]
                segment = _host.Segment.open(pids[0], *found, len(ranks), registered_bytes)
            native = _host.Communicator(segment, ranks.index(rank), pids, timeout)
        except RuntimeError as error:
            outcome["problem"] = str(error)
    reason = _first_problem(_exchange(group, outcome, timeout))
    if native is None or reason:
        return None, reason, number
    native.close_descriptor()
    return native, "", number


def hosts_of(group: dist.ProcessGroup, timeout: float) -> list[list[int]]:
    """The ranks of each host, in their order; hosts in that of their first ranks."""
    hosts: dict[str, list[int]] = {}
    for rank, message in enumerate(_exchange(group, {"host": _host_identity()}, timeout)):
        hosts.setdefault(message["host"], []).append(rank)
    return list(hosts.values())


def _first_problem(messages: list[dict[str, Any]]) -> str:
    for rank, message in enumerate(messages):
        if problem := message["problem"]:
            return problem if problem.startswith("rank ") else f"rank {rank}: {problem}"
    return ""


def _host_identity() -> str:
    """Equal for processes that see one another under the same numbers, may share memory, and speak alike."""
    from teco_kernels import __version__

    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.readlink("/proc/self/ns/pid")
    except OSError as error:
        return f"{error.filename} of process {os.getpid()} cannot be read"
    return f"{boot} {processes} {os.geteuid()} {__version__}"


def _exchange(group: dist.ProcessGroup, message: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    """The messages of all ranks."""
    if "problem" in message:
        message = message | {"problem": message["problem"][: _MESSAGE_BYTES // 8]}  # a character may take six bytes
    data = json.dumps(message).encode().ljust(_MESSAGE_BYTES)
    sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    received = torch.empty(dist.get_world_size(group), _MESSAGE_BYTES, dtype=torch.uint8)
    try:
        wait(dist.all_gather(list(received), sent, group=group, async_op=True), timeout)
    except RuntimeError as error:
        raise CommunicatorError(f"connecting the ranks of a communicator: {error}") from error
    return [json.loads(row.numpy().tobytes()) for row in received]
