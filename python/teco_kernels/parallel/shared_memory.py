"""Collectives over shared memory, and how ranks come to share it."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from teco_kernels import _host
from teco_kernels._host import CommunicatorError
from teco_kernels.parallel.operators import OperatorTransport
from teco_kernels.parallel.process_group import wait

_MESSAGE_BYTES = 1024
_numbers = itertools.count()
#: Why ranks cannot all share memory, when some still may.
SEVERAL_HOSTS = "the ranks are on several hosts, or do not see one another's processes"


class SharedMemoryTransport(OperatorTransport):
    """The operators over a native communicator of processes that share memory."""

    def __init__(self, native: _host.Communicator, registered_bytes: int = 0) -> None:
        super().__init__(native, registered_bytes, torch.device("cpu"))

    @classmethod
    def alone(cls) -> SharedMemoryTransport:
        """Of this process only. RuntimeError where the system lacks what ranks need to share memory."""
        return cls(_host.Communicator(_host.Segment.create(1), 0, [os.getpid()], 1.0))


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
    everyone = exchange(group, here, timeout)
    number = everyone[0]["number"]
    if reason := first_problem(everyone):
        return None, reason, number

    native, segment = None, None
    offer: dict[str, Any] = {"problem": ""}
    if rank == ranks[0]:
        try:
            segment = _host.Segment.create(len(ranks), registered_bytes)
            offer |= {"descriptor": segment.descriptor, "token": segment.token}
        except RuntimeError as error:
            offer["problem"] = str(error)
    offers = exchange(group, offer, timeout)
    outcome = {"problem": first_problem(offers)}
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
    reason = first_problem(exchange(group, outcome, timeout))
    if native is None or reason:
        return None, reason, number
    native.close_descriptor()
    return native, "", number


def hosts_of(group: dist.ProcessGroup, timeout: float) -> list[list[int]]:
    """The ranks of each host, in their order; hosts in that of their first ranks."""
    hosts: dict[str, list[int]] = {}
    for rank, message in enumerate(exchange(group, {"host": _host_identity()}, timeout)):
        hosts.setdefault(message["host"], []).append(rank)
    return list(hosts.values())


def first_problem(messages: list[dict[str, Any]]) -> str:
    """The first one that a rank has told of, and which rank that is; empty when there is none."""
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


def exchange(group: dist.ProcessGroup, message: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    """The messages of all ranks."""
    if "problem" in message:
        message = message | {"problem": message["problem"][: _MESSAGE_BYTES // 8]}  # a character may take six bytes
    data = json.dumps(message).encode().ljust(_MESSAGE_BYTES)
    sent = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_message_device(group))
    received = sent.new_empty(dist.get_world_size(group), _MESSAGE_BYTES)
    try:
        wait(dist.all_gather(list(received), sent, group=group, async_op=True), timeout)
    except RuntimeError as error:
        raise CommunicatorError(f"connecting the ranks of a communicator: {error}") from error
    return [json.loads(row.numpy().tobytes()) for row in received.cpu()]


def _message_device(group: dist.ProcessGroup) -> torch.device:
    """Where the group carries tensors: a group of GPUs alone has no way for those of the CPU."""
    types = {device.type for device in group._device_types}
    return torch.device("cpu" if "cpu" in types else min(types))
