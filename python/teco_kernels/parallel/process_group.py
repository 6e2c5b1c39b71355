"""Collectives carried by a torch.distributed group: across hosts, and wherever memory cannot be shared.

The group only moves data. Sums are made here, in the order of the ranks and in fp32 (fp64 ones in fp64), so that the
bits are those of the ranks that share memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from teco_kernels._host import CommunicatorError
from teco_kernels.ops import fused_add_rms_norm
from teco_kernels.parallel.arguments import check_copy, check_norm, check_root, check_rows, check_sum

#: Up to so many bytes every rank gets the data of all others and adds all of it up; beyond, each adds up a share.
ONE_SHOT_BYTES = 64 * 1024


def wait(work: Any, timeout: float) -> None:
    """Wait for what the group does; RuntimeError when it fails or takes too long."""
    if math.isinf(timeout):
        work.wait()
    else:
        work.wait(timedelta(seconds=timeout))


class ProcessGroupTransport:
    """The same collectives, by `all_gather`, `all_to_all` and `broadcast` of the group."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout: float,
        registered_bytes: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._group = group
        self._timeout = timeout
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._end = ""
        self.registered = torch.empty(registered_bytes, dtype=torch.uint8, device=device)  # as good as any

    def all_reduce(self, out: Tensor, x: Tensor) -> None:
        """Write the sum over the ranks."""
        check_sum(out, x, x.shape)
        self.add(out, x)

    def add(self, out: Tensor, x: Tensor) -> None:
        """As `all_reduce`, of fp64 too, without checks."""
        if x.numel() * x.element_size() <= ONE_SHOT_BYTES:
            gathered = x.new_empty(self._world_size, *x.shape)
            self.all_gather(gathered, x)
            out.copy_(add_rows(gathered))
            return
        share = -(-x.numel() // self._world_size)
        shares = x.new_zeros(self._world_size, share)
        shares.view(-1)[: x.numel()] = x.reshape(-1)
        summed = x.new_empty(share)
        self._sum_share(summed, shares)
        self.all_gather(shares, summed)
        out.view(-1).copy_(shares.view(-1)[: x.numel()])

    def all_reduce_rms_norm(
        self, normed: Tensor, new_residual: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> None:
        """Write the sum plus the residual, and its norm."""
        check_norm(normed, new_residual, x, residual, weight)
        if x.dtype == torch.float64:
            exact = torch.empty_like(x)
            self.add(exact, x)
            normed.copy_(exact.float())
        else:
            self.add(normed, x)
        fused_add_rms_norm(normed, residual, weight, eps, out=(normed, new_residual))

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Write the tensors of all ranks."""
        check_rows(out, x, self._rank, self._world_size)
        self._run(dist.all_gather, list(out), x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """Write this rank's row of the sum."""
        if x.dim() == 0 or x.shape[0] != self._world_size:
            raise ValueError(f"input: expected shape [{self._world_size}, ...], a row per rank, got {list(x.shape)}")
        check_sum(out, x, x.shape[1:])
        self._sum_share(out, x)

    def _sum_share(self, out: Tensor, x: Tensor) -> None:
        received = torch.empty_like(x)
        self._run(dist.all_to_all_single, received.view(-1), x.view(-1))
        out.copy_(add_rows(received))

    def broadcast(self, out: Tensor, x: Tensor, root: int) -> None:
        """Write the root's tensor."""
        check_root(root, self._world_size)
        check_copy(out, x, x.shape)
        if out is not x:
            out.copy_(x)
        self._run(dist.broadcast, out, group_src=root)

    def close(self) -> None:
        """Take part no more."""
        self._end = self._end or "it was closed here"

    def _run(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._end:
            raise CommunicatorError(f"communicator over a process group: {self._end}")
        try:
            wait(collective(*args, group=self._group, async_op=True, **kwargs), self._timeout)
        except RuntimeError as error:
            self._end = str(error)
            raise CommunicatorError(f"communicator over a process group: {error}") from error


def add_rows(rows: Tensor) -> Tensor:
    """The sum over the first dimension, in order: fp32, or fp64 of fp64."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = rows[0].to(dtype)
    for row in rows[1:]:
        total = total + row.to(dtype)
    return total
