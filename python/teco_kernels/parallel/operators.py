"""Collectives that are operators of the dispatcher: they may be recorded in a `Plan`, and compiled."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor

from teco_kernels.ops import collectives


class NativeCommunicator(Protocol):
    """What `_host` has of a communicator, of whichever kind."""

    @property
    def number(self) -> int:
        """Of this communicator in this process."""

    @property
    def registered(self) -> int:
        """Address of this rank's registered memory."""

    def close(self) -> None:
        """Take part no more."""


class OperatorTransport:
    """The operators over a native communicator, which they know by its number.

    Attributes
    ----------
    number : int
    registered : Tensor
        uint8 ``[registered_bytes]``, see `Communicator.registered`.
    """

    def __init__(self, native: NativeCommunicator, registered_bytes: int, device: torch.device) -> None:
        self._native = native
        self.number = native.number
        self.registered = _memory_at(native, registered_bytes, device)

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


class _DeviceMemory:
    """Memory of a GPU as torch takes it from others; keeps what it belongs to."""

    def __init__(self, owner: NativeCommunicator, nbytes: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (owner.registered, False),
            "version": 3,
        }


def _memory_at(owner: NativeCommunicator, nbytes: int, device: torch.device) -> Tensor:
    """A uint8 tensor over memory that is there for as long as `owner` is, which it keeps."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        return torch.as_tensor(_DeviceMemory(owner, nbytes), device=device)
    memory = (ctypes.c_uint8 * nbytes).from_address(owner.registered)
    memory._owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8)
