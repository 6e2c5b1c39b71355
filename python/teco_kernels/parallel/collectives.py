"""The collectives: every rank makes the same calls in the same order, with equal shapes and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from teco_kernels.parallel.communicator import Communicator


def all_reduce(x: Tensor, comm: Communicator, *, out: Tensor | None = None) -> Tensor:
    """Sum of the ranks' tensors, on every rank.

    Parameters
    ----------
    x : Tensor
        Any shape, contiguous, fp32, fp16 or bf16.
    comm : Communicator
        Over which ranks.
    out : Tensor, optional
        Written and returned instead of a new tensor; shape and dtype of `x`. May be `x` itself.

    Returns
    -------
    Tensor
        ``((x_0 + x_1) + x_2) + ...`` in fp32, rounded once: the same bits on every rank.

    Raises
    ------
    CommunicatorError
        A rank has ended, called something else, or did not come in time. `out` is then unspecified.

    Notes
    -----
    Up to a size that depends on the number of ranks alone, every rank reads the data of all others and adds it up
    (one-shot); beyond, each adds up a share, which the others fetch (two-shot). Bits do not depend on it.
    """
    if out is None:
        out = torch.empty_like(x)
    comm.transport.all_reduce(out, x)
    return out


def all_reduce_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    comm: Communicator,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the ranks' tensors, the residual added, and the norm of that: what follows a row-parallel matmul.

    Parameters
    ----------
    x : Tensor
        ``[..., hidden_size]``, contiguous; a partial sum of this rank. Of the dtype of `residual`, or fp64: exact sums
        of `gptq_matmul`, which are added in fp64 and rounded to fp32.
    residual : Tensor
        Shape of `x`; fp32, fp16 or bf16; equal on all ranks, if the results are to be.
    weight : Tensor
        ``[hidden_size]``, dtype of `residual`; equal on all ranks.
    eps : float
        Added to the mean square.
    comm : Communicator
        Over which ranks.
    out : tuple of Tensor, optional
        ``(normed, new_residual)``, written and returned; may be ``(x, residual)`` themselves, if `x` is not fp64.

    Returns
    -------
    normed, new_residual : Tensor
        The very bits of ``fused_add_rms_norm(all_reduce(x, comm), residual, weight, eps)``.

    Raises
    ------
    CommunicatorError
        As `all_reduce`.
    """
    if out is None:
        out = torch.empty_like(residual), torch.empty_like(residual)
    normed, new_residual = out
    comm.transport.all_reduce_rms_norm(normed, new_residual, x, residual, weight, eps)
    return out


def all_gather(x: Tensor, comm: Communicator, *, out: Tensor | None = None) -> Tensor:
    """The tensors of all ranks, on every rank.

    Parameters
    ----------
    x : Tensor
        Any shape, contiguous; floating, integer or bool.
    comm : Communicator
        Over which ranks.
    out : Tensor, optional
        ``[world_size, *x.shape]``, dtype of `x`; written and returned instead of a new tensor. `x` may be its row
        `comm.rank`.

    Returns
    -------
    Tensor
        ``[world_size, *x.shape]``: row r is what rank r gave.

    Raises
    ------
    CommunicatorError
        As `all_reduce`.
    """
    if out is None:
        out = x.new_empty(comm.world_size, *x.shape)
    comm.transport.all_gather(out, x)
    return out


def reduce_scatter(x: Tensor, comm: Communicator, *, out: Tensor | None = None) -> Tensor:
    """A row of the sum of the ranks' tensors for each rank.

    Parameters
    ----------
    x : Tensor
        ``[world_size, ...]``, contiguous, fp32, fp16 or bf16.
    comm : Communicator
        Over which ranks.
    out : Tensor, optional
        ``x.shape[1:]``, dtype of `x`; written and returned instead of a new tensor.

    Returns
    -------
    Tensor
        ``x.shape[1:]``: row `comm.rank` of what `all_reduce` gives, bit for bit.

    Raises
    ------
    CommunicatorError
        As `all_reduce`.
    """
    if out is None:
        out = x.new_empty(x.shape[1:])
    comm.transport.reduce_scatter(out, x)
    return out


def broadcast(x: Tensor, comm: Communicator, *, root: int = 0, out: Tensor | None = None) -> Tensor:
    """The tensor of one rank, on every rank.

    Parameters
    ----------
    x : Tensor
        Any shape, contiguous; floating, integer or bool. Only that of the root is read; it gives shape and dtype.
    comm : Communicator
        Over which ranks.
    root : int
        The rank whose tensor it is.
    out : Tensor, optional
        Written and returned instead of a new tensor; shape and dtype of `x`. May be `x` itself.

    Returns
    -------
    Tensor
        What the root gave.

    Raises
    ------
    CommunicatorError
        As `all_reduce`.
    """
    if out is None:
        out = torch.empty_like(x)
    comm.transport.broadcast(out, x, root)
    return out
