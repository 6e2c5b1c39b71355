"""Collectives over shared memory, and how ranks come to share it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from teco_kernels import _host
from teco_kernels._host import CommunicatorError
from teco_kernels.parallel.process_group import wait

# As csrc/params.h numbers them; those without a sum are only ever compared, between ranks.
_SUMMED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_DTYPES = _SUMMED | {
    dtype: 16 + number
    for number, dtype in enumerate(
        (torch.int8, torch.uint8, torch.bool, torch.int16, torch.int32, torch.int64, torch.float64, torch.float8_e4m3fn)
    )
}
_MESSAGE_BYTES = 1024


class SharedMemoryTransport:
    """Hands the addresses of tensors to the native communicator."""

    def __init__(self, native: _host.Communicator) -> None:
        self._native = native

    def all_reduce(self, out: Tensor, x: Tensor) -> None:
        """Write the sum over the ranks."""
        if not x.is_cpu:
            _on_cpu(x)
        self._native.all_reduce(out.data_ptr(), x.data_ptr(), x.numel(), _SUMMED[x.dtype])

    def all_reduce_rms_norm(
        self, normed: Tensor, new_residual: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> None:
        """Write the sum plus the residual, and its norm."""
        row_size = weight.numel()
        self._native.all_reduce_rms_norm(
            normed.data_ptr(),
            new_residual.data_ptr(),
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            x.numel() // max(row_size, 1),
            row_size,
            eps,
            _summed(x),
        )

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Write the tensors of all ranks."""
        self._native.all_gather(out.data_ptr(), x.data_ptr(), x.numel(), x.element_size(), _number(x))

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """Write this rank's row of the sum."""
        self._native.reduce_scatter(out.data_ptr(), x.data_ptr(), out.numel(), _summed(x))

    def broadcast(self, out: Tensor, x: Tensor, root: int) -> None:
        """Write the root's tensor."""
        self._native.broadcast(out.data_ptr(), x.data_ptr(), x.numel(), x.element_size(), _number(x), root)

    def close(self) -> None:
        """Take part no more."""
        self._native.close()


def _on_cpu(x: Tensor) -> None:
    if not x.is_cpu:
        raise ValueError(f"x: expected a tensor on the cpu, where the ranks share memory, got {x.device}")


def _summed(x: Tensor) -> int:
    _on_cpu(x)
    return _SUMMED[x.dtype]


def _number(x: Tensor) -> int:
    _on_cpu(x)
    if (number := _DTYPES.get(x.dtype)) is None:
        raise TypeError(f"x: expected one of {', '.join(map(str, _DTYPES))}, got {x.dtype}")
    return number


def problem_here() -> str:
    """Why this process cannot share memory with others; empty when it can."""
    try:
        _host.Communicator(_host.Segment.create(1), 0, [os.getpid()], 1.0)
    except RuntimeError as error:
        return str(error)
    return ""


def connect(group: dist.ProcessGroup, timeout: float) -> tuple[_host.Communicator | None, str]:
    """The native communicator of this rank, or None and the reason, which all ranks share.

    Rank 0 makes the memory, without a name, so that nothing is left of it whoever dies when; the others open it by its
    descriptor in rank 0, which is closed once all have done so.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if world_size > _host.MAX_RANKS:
        return None, f"{world_size} ranks are more than {_host.MAX_RANKS}"
    if "cpu" not in {device.type for device in group._device_types}:
        return None, "the group has no backend for the cpu"

    here = {"host": _host_identity(), "pid": os.getpid(), "problem": problem_here()}
    everyone = _exchange(group, here, timeout)
    if len({message["host"] for message in everyone}) > 1:
        return None, "the ranks are on several hosts, or do not see one another's processes"
    if reason := _first_problem(everyone):
        return None, reason

    native, segment = None, None
    offer: dict[str, Any] = {"problem": ""}
    if rank == 0:
        try:
            segment = _host.Segment.create(world_size)
            offer |= {"descriptor": segment.descriptor, "token": segment.token}
        except RuntimeError as error:
            offer["problem"] = str(error)
    offer = _exchange(group, offer, timeout)[0]
    outcome = {"problem": offer["problem"]}
    pids = [message["pid"] for message in everyone]
    if not offer["problem"]:
        try:
            segment = segment or _host.Segment.open(pids[0], offer["descriptor"], offer["token"], world_size)
            native = _host.Communicator(segment, rank, pids, timeout)
        except RuntimeError as error:
            outcome["problem"] = str(error)
    reason = _first_problem(_exchange(group, outcome, timeout))
    if native is None or reason:
        return None, reason
    native.close_descriptor()
    return native, ""


def _first_problem(messages: list[dict[str, Any]]) -> str:
    return next((f"rank {rank}: {m['problem']}" for rank, m in enumerate(messages) if m["problem"]), "")


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
    data = json.dumps(message).encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES)
    sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    received = torch.empty(dist.get_world_size(group), _MESSAGE_BYTES, dtype=torch.uint8)
    try:
        wait(dist.all_gather(list(received), sent, group=group, async_op=True), timeout)
    except RuntimeError as error:
        raise CommunicatorError(f"connecting the ranks of a communicator: {error}") from error
    return [json.loads(row.numpy().tobytes()) for row in received]
