"""Collectives of ranks with a GPU each, on one host: kernels that read one another's memory, mapped by IPC handles."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from teco_kernels import _host
from teco_kernels.ops import _library
from teco_kernels.parallel.operators import OperatorTransport
from teco_kernels.parallel.shared_memory import exchange, first_problem


class DeviceMemoryTransport(OperatorTransport):
    """The operators over a native communicator of GPUs. A call puts a kernel on the current stream and comes back."""

    @classmethod
    def alone(cls, device: torch.device) -> DeviceMemoryTransport:
        """Of this process only. RuntimeError where the build has no CUDA kernels."""
        native = _host.DeviceCommunicator(_index(device), 0, 1, 1.0)
        native.connect([native.handle])
        return cls(native, 0, device)


def _index(device: torch.device) -> int:
    """Of a GPU among those of this process; emulated ones have none."""
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def connect_devices(
    hosts: list[list[int]], group: dist.ProcessGroup, timeout: float, registered_bytes: int, device: torch.device
) -> tuple[DeviceMemoryTransport | None, str]:
    """The transport of this rank, or None and the reason, which all ranks share; all ranks of the group call it."""
    ranks = hosts[0]
    if len(hosts) > 1:
        return None, "the ranks are on several hosts"
    if len(ranks) > _host.MAX_RANKS:
        return None, f"{len(ranks)} ranks are more than {_host.MAX_RANKS}"

    native: _host.DeviceCommunicator | None = None
    offer: dict[str, Any] = {"problem": "", "handle": ""}
    if not _library.has_kernel("all_reduce", "cuda"):
        offer["problem"] = "this build has no CUDA kernels"
    else:
        rank = dist.get_rank(group)
        try:
            native = _host.DeviceCommunicator(_index(device), rank, len(ranks), timeout, registered_bytes)
            offer["handle"] = native.handle.hex()
        except RuntimeError as error:
            offer["problem"] = str(error)
    offers = exchange(group, offer, timeout)
    outcome = {"problem": first_problem(offers)}
    if native is not None and not outcome["problem"]:
        try:
            native.connect([bytes.fromhex(other["handle"]) for other in offers])
        except RuntimeError as error:
            outcome["problem"] = str(error)
    reason = first_problem(exchange(group, outcome, timeout))
    if native is None or reason:
        return None, reason
    return DeviceMemoryTransport(native, registered_bytes, device), ""
